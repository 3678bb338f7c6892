"""SNC that starts from the trunk's own attention: what a layer finds in its text, SNC finds in notes.

Letters: D trunk width, N note width, H heads, h head width of the trunk, s of SNC.
"""

import torch
from torch import nn

from .snc import SharedNotesCrossAttention

PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj")


@torch.no_grad()
def start_from_attention(
    snc: SharedNotesCrossAttention, layer: nn.Module, note_projection_ND: torch.Tensor, name: str = "layer"
) -> None:
    """
    Gives SNC the two circuits of every head of a decoder layer's attention: what a token asks for against what a
    state offers (queries, keys), and what is carried over (values, outputs).

    A head of SNC may be narrower than the trunk's: each circuit becomes its best approximation of that rank. Outputs
    together get the size of an identity's, because SNC adds in units of the state's own RMS; the order of tokens
    (rotary embeddings), biases and sinks have no counterpart among notes and are left out.

    Args:
        snc ([`SharedNotesCrossAttention`]): As many heads as the attention; left as it is where weights are missing
            (meta device), which are then loaded later.
        layer (`nn.Module`): Decoder layer with `input_layernorm` and `self_attn` of `PROJECTIONS`.
        note_projection_ND (`torch.Tensor` of shape `[N, D]`): Orthonormal rows that map normalised states to notes.
        name (`str`, *optional*): What the layer is called in errors.

    Raises:
        ValueError: When the attention has other parts or another number of heads, or its weights are not whole.
    """
    attention = layer.self_attn
    check_attention(attention, snc.num_heads, name)
    weights = [getattr(attention, projection).weight for projection in PROJECTIONS]
    if any(weight.is_meta for weight in (*weights, snc.q_proj.weight)):
        return
    asked, carried = circuits(layer)
    # SNC divides its scores by the root of its own head width, and has its heads one after the other.
    queries_DD, keys_DD = (part.flatten(0, 1) for part in factors(*asked, snc.head_dim))
    outputs_DD, values_DD = (part.flatten(0, 1) for part in factors(*carried, snc.head_dim))
    size = (torch.linalg.matrix_norm(outputs_DD.T @ values_DD) / values_DD.shape[1] ** 0.5) ** 0.5
    projection_DN = note_projection_ND.to(values_DD).T
    snc.q_proj.weight.copy_(queries_DD * snc.head_dim**0.5)
    snc.k_proj.weight.copy_(keys_DD @ projection_DN)
    snc.v_proj.weight.copy_(values_DD / size @ projection_DN)
    snc.o_proj.weight.copy_(outputs_DD.T / size)


def check_attention(attention: nn.Module, heads: int, name: str) -> None:
    """Raises a `ValueError` that says what an attention lacks to be a start for SNC with so many heads."""
    where = f"snc_init='trunk_attention', {name}: {type(attention).__name__}"
    missing = [part for part in PROJECTIONS if not hasattr(getattr(attention, part, None), "weight")]
    if missing:
        raise ValueError(f"{where} has no {', '.join(missing)}; allowed: an attention with {', '.join(PROJECTIONS)}.")
    packed = [part for part in PROJECTIONS if not getattr(attention, part).weight.is_floating_point()]
    if packed:
        raise ValueError(f"{where} has {', '.join(packed)} in a packed format; allowed: floating-point weights.")
    if any(getattr(attention, part).weight.numel() == 0 for part in PROJECTIONS):
        raise ValueError(f"{where} is spread over processes; allowed: a trunk loaded whole (zero3_init_flag: false).")
    found = attention.config.num_attention_heads
    if found != heads:
        raise ValueError(f"{where} has {found} heads, allowed: as many as snc_heads={heads}.")


def circuits(layer: nn.Module) -> tuple[tuple[torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]:
    """
    Both circuits of every head as pairs of factors `[H, h, D]`, in float32, for states of RMS 1: the product of
    queries and keys is a score, that of outputs and values an update.
    """
    attention = layer.self_attn
    q, k, v, o = (getattr(attention, projection).weight.float() for projection in PROJECTIONS)
    heads = attention.config.num_attention_heads
    width, shared = q.shape[0] // heads, q.shape[0] // k.shape[0]
    # What the norm before attention scales channels by, whatever its form.
    ones = torch.ones(1, 1, q.shape[1], device=q.device, dtype=next(layer.input_layernorm.parameters()).dtype)
    channels_D = layer.input_layernorm(ones).float().flatten()

    def by_head(weight: torch.Tensor, repeats: int) -> torch.Tensor:
        return (weight.view(-1, width, weight.shape[1]) * channels_D).repeat_interleave(repeats, dim=0)

    queries_HhD, keys_HhD, values_HhD = by_head(q, 1), by_head(k, shared), by_head(v, shared)
    if hasattr(attention, "q_norm"):
        queries_HhD, keys_HhD = _normed(queries_HhD, attention.q_norm), _normed(keys_HhD, attention.k_norm)
    outputs_HhD = o.view(o.shape[0], heads, width).permute(1, 2, 0)
    return (queries_HhD * attention.scaling, keys_HhD), (outputs_HhD, values_HhD)


def factors(left_HhD: torch.Tensor, right_HhD: torch.Tensor, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Two factors `[H, rank, D]` whose product `left^T right` is, head by head, the best one of that rank to the given.

    Both get the root of the singular values. Where `rank` exceeds what is there, the left one ends in zeros beside
    copies on the right, so that the product stays and the zeros learn.
    """
    left_Q, left_R = torch.linalg.qr(left_HhD.transpose(1, 2))
    right_Q, right_R = torch.linalg.qr(right_HhD.transpose(1, 2))
    u, s, vh = torch.linalg.svd(left_R @ right_R.transpose(1, 2))
    root = s.sqrt()[:, :rank, None]
    left = root * (left_Q @ u).transpose(1, 2)[:, :rank]
    right = root * (vh @ right_Q.transpose(1, 2))[:, :rank]
    if (more := rank - left.shape[1]) > 0:
        left = torch.cat([left, torch.zeros_like(left[:, :1]).expand(-1, more, -1)], dim=1)
        right = torch.cat([right, right.repeat(1, -(-more // right.shape[1]), 1)[:, :more]], dim=1)
    return left, right


def _normed(part_HhD: torch.Tensor, norm: nn.Module) -> torch.Tensor:
    """Queries or keys that a norm brings to RMS 1 head by head: for states without a direction, in the mean."""
    width = part_HhD.shape[1]
    ones = torch.ones(1, width, device=part_HhD.device, dtype=next(norm.parameters()).dtype)
    rms_H11 = torch.linalg.matrix_norm(part_HhD)[:, None, None] * width**-0.5
    return part_HhD / rms_H11 * norm(ones).float().view(1, width, 1)
