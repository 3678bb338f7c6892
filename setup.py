"""Packaging of the Parallel Decoder Transformer. Tool settings live in pyproject.toml."""

from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).resolve().parent
README = ROOT / "README.md"

INSTALL_REQUIRES = [
    "torch>=2.9",
    "transformers>=5.23,<6",
    "peft>=0.21.2,<0.22",
    "huggingface-hub>=2.4,<3",
    "accelerate>=1.15,<2",
    "datasets>=5.2,<6",
    "evaluate>=0.4.6,<0.5",
    "safetensors>=0.8,<1",
    "tokenizers>=0.23,<1",
    "numpy>=2.0,<3",
    "pyyaml>=6.0",
    "jinja2>=3.1",
    "matplotlib>=3.9",
    "rich>=13.7",
    "tqdm>=4.66",
]
EXTRAS = {
    "test": ["pytest>=9.0,<10", "pytest-xdist>=3.8,<4", "hypothesis>=6.150,<7"],
    "quality": ["ruff>=0.17,<0.18", "codespell>=2.4,<3", "pre-commit>=4.0,<5"],
    "docs": ["mkdocs>=1.6,<2", "mkdocs-material>=9.7,<10", "mkdocstrings>=1.0,<2", "mkdocstrings-python>=2.0,<3"],
    "deepspeed": ["deepspeed>=0.19.8,<0.20"],
    "bertscore": ["bert-score>=0.3.13,<0.4"],
    "space": ["gradio>=6.31,<7"],
    "browser": ["playwright>=1.65,<2"],
}

setup(
    name="parallel-decoder-transformer",
    version="0.1.0.dev0",
    description="One frozen language model writes the sections of one answer in parallel, coordinated by a notes bus.",
    long_description=README.read_text(encoding="utf-8") if README.exists() else "",
    long_description_content_type="text/markdown",
    author="The Parallel Decoder Transformer authors",
    license="Apache-2.0",
    license_files=["LICENSE"],
    keywords="transformers peft parallel-decoding text-generation gpt-oss",
    packages=find_packages(include=["modeling_pdt", "trainer_pdt", "trainer_pdt.*", "hub_cards"]),
    package_data={"hub_cards": ["*.md"], "trainer_pdt": ["*.json"]},
    include_package_data=False,
    python_requires=">=3.11",
    install_requires=INSTALL_REQUIRES,
    extras_require=EXTRAS,
    classifiers=[
        "Development Status :: 3 - Alpha",
        "Intended Audience :: Science/Research",
        "Programming Language :: Python :: 3",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
    ],
)
