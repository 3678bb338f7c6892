"""Vocabulary of the procedural worlds: value pools, fact types, sections, sentence frames. Constants only."""

from dataclasses import dataclass


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


POOLS: dict[str, tuple[str, ...]] = {
    name: _words(words)
    for name, words in {
        "color": "red blue green amber black white brown grey pink violet beige scarlet golden crimson teal cream "
        "indigo maroon purple yellow",
        "metal": "iron copper tin zinc lead nickel cobalt brass steel bronze silver gold pewter radium platinum "
        "barium titanium chrome mercury lithium",
        "crop": "wheat barley oats rye corn rice beans peas hemp flax hops millet lentils cotton squash turnips "
        "cabbage carrots onions beets",
        "fruit": "apples pears plums cherries peaches grapes figs lemons mangos melons quinces apricots berries dates "
        "bananas oranges limes papayas olives currants",
        "animal": "wolf bear fox deer otter badger beaver lynx hare horse goat bull lion tiger camel moose boar seal "
        "mole ferret",
        "bird": "eagle hawk owl crow heron swan stork falcon raven dove robin finch gull crane duck goose parrot "
        "magpie pelican sparrow",
        "tree": "oak pine elm ash birch maple cedar willow beech fir larch alder poplar hazel cypress walnut yew "
        "spruce rowan palm",
        "flower": "rose lily tulip daisy iris poppy orchid lotus jasmine dahlia peony clover thistle heather marigold "
        "aster lupin crocus azalea lavender",
        "fabric": "silk wool linen velvet denim felt lace satin tweed canvas leather nylon fleece muslin calico suede "
        "damask corduroy jute cashmere",
        "drink": "tea coffee cider beer wine mead rum gin brandy cocoa milk ale juice vodka whisky lemonade sherry "
        "port punch stout",
        "instrument": "drum flute harp fiddle lute horn bell piano organ violin cello trumpet banjo guitar oboe tuba "
        "zither cymbal whistle bagpipe",
        "river": "Arvo Belm Corra Dunet Elsen Farro Gandel Hollin Istra Jorun Kessa Lomar Mirrow Nessar Orlan Pellin "
        "Wennar Rendal Sovar Tamber",
        "year": "1801 1807 1812 1816 1823 1829 1834 1838 1845 1847 1852 1859 1863 1868 1874 1876 1881 1887 1892 1896 "
        "1903 1905 1911 1918",
    }.items()
}
"""Value type -> its values. No word belongs to two types."""

GIVEN_NAMES = _words("""
Anna Bruno Carla David Edith Felix Greta Hugo Irene Jacob Karin Lucas Maria Nils Olga Peter Rosa Simon Tilda
Viktor
""")
SURNAMES = _words("""
Abbott Barlow Carter Dalton Easton Foster Garner Harper Ingram Jensen Keller Lawson Mercer Norton Osborn
Palmer Ramsey Sutton Turner Weaver
""")
PERSON = "person"
HARD_TYPES = (PERSON, "year")
"""Value types that only hard documents use, several times per document."""

NUM_HELDOUT_VALUES = 4
"""The last values of each pool (and of both name lists) never occur in adapter training documents."""

SUBJECT_STARTS = _words("""
Vel Mor Tan Bri Kel Sar Dun Hal Nor Pel Ros Wil Ber Cal Fen Lun
""")
SUBJECT_ENDS = _words("""
mar dale wick ton stead ford holm burg nath vik mere low by sund gate lin
""")


@dataclass(frozen=True)
class Cue:
    """One fact type.

    Args:
        name (`str`): The words that stand before the value in every sentence; also the cue's id.
        value_type (`str`): Key of `POOLS`, or ``"person"``.
        wordings (`tuple[str]`): How a plan may say it. The last two are never used in adapter training.
        source (`str`, *optional*): For a linked fact the cue whose value it must repeat.
    """

    name: str
    value_type: str
    wordings: tuple[str, ...]
    source: str | None = None


@dataclass(frozen=True)
class Section:
    """One kind of section: heading, cues of core documents, the cue that hard documents add, a linked cue, openers."""

    header: str
    core: tuple[str, str]
    hard: str
    linked: str | None
    openers: tuple[str, str]


@dataclass(frozen=True)
class Domain:
    """A kind of fictional subject with its six sections and the requests that may open a document."""

    name: str
    requests: tuple[str, ...]
    sections: tuple[Section, ...]


NUM_HELDOUT_WORDINGS = 2
"""The last wordings of each cue never occur in adapter training documents."""

NUMBER_WORDS = ("zero", "one", "two", "three", "four", "five", "six")


def _cues(rows: str) -> dict[str, Cue]:
    """Reads ``name | type | wording | held-out wording | held-out wording [| source]``, one cue per line."""
    cues = {}
    for row in rows.strip().splitlines():
        name, value_type, wording, first, second, *source = (part.strip() for part in row.split("|"))
        trained = (name, f"the {name}", f"facts about the {name}", f"{name} and its story")
        wordings = (*trained, wording, f"{value_type}: {wording}", first, second)
        cues[name] = Cue(name, value_type, wordings, source[0] if source else None)
    return cues


CUES: dict[str, Cue] = _cues("""
main crop        | crop       | what the fields grow     | crop they grow most     | name of the main crop
orchard fruit    | fruit      | what the orchards bear   | fruit from the orchard  | name of the orchard fruit
chief farmer     | person     | who leads the farmers    | farmer in charge        | name of the chief farmer
mined metal      | metal      | what the mine yields     | metal from the mine     | name of the mined metal
woven cloth      | fabric     | what the looms weave     | cloth from the looms    | name of the woven cloth
mill year        | year       | when the mill opened     | year of the mill        | date for the mill year
wild animal      | animal     | what roams the woods     | animal of the woods     | name of the wild animal
common tree      | tree       | what shades the paths    | tree along the paths    | name of the common tree
forest keeper    | person     | who minds the forest     | keeper of the woods     | name of the forest keeper
folk instrument  | instrument | what the band plays      | instrument of the band  | name of the folk instrument
local drink      | drink      | what the inns pour       | drink at the inns       | name of the local drink
feast year       | year       | when the feast began     | year of the first feast | date for the feast year
feast dish | crop | dish made of the crop | crop on the feast table | name of the feast dish | main crop
flag color       | color      | what the flag shows      | color on the flag       | name of the flag color
crest bird       | bird       | what sits on the crest   | bird on the crest       | name of the crest bird
crest painter    | person     | who made the crest       | painter of the crest    | name of the crest painter
coin metal | metal | coin made of the metal | metal in the coins | name of the coin metal | mined metal
nearby river     | river      | what the bridge spans    | river at the bridge     | name of the nearby river
park flower      | flower     | what the park plants     | flower in the park      | name of the park flower
bridge year      | year       | when the bridge opened   | year of the bridge      | date for the bridge year
raw metal        | metal      | what the shop melts      | metal they melt         | name of the raw metal
lining fabric    | fabric     | what lines the cases     | fabric in the cases     | name of the lining fabric
launch year      | year       | when sales began         | year of the launch      | date for the launch year
logo bird        | bird       | what the logo shows      | bird in the logo        | name of the logo bird
brand color      | color      | what the boxes wear      | color of the boxes      | name of the brand color
logo artist      | person     | who drew the logo        | artist of the logo      | name of the logo artist
office drink     | drink      | what the kitchen serves  | drink from the kitchen  | name of the office drink
team mascot      | animal     | what the team adopted    | animal of the team      | name of the team mascot
team leader      | person     | who leads the team       | leader of the staff     | name of the team leader
lobby flower     | flower     | what stands in the lobby | flower in the lobby     | name of the lobby flower
yard tree        | tree       | what grows in the yard   | tree of the yard        | name of the yard tree
campus year      | year       | when the campus opened   | year of the campus      | date for the campus year
statue bird | bird | statue of the logo | bird on the statue | name of the statue bird | logo bird
bulk grain       | crop       | what fills the store     | grain in the store      | name of the bulk grain
snack fruit      | fruit      | what the bowls hold      | fruit in the bowls      | name of the snack fruit
chief buyer      | person     | who buys the goods       | buyer in charge         | name of the chief buyer
parade music     | instrument | what leads the parade    | instrument in front     | name of the parade music
ferry river      | river      | what the ferry crosses   | river for the ferry     | name of the ferry river
gala year        | year       | when the gala began      | year of the first gala  | date for the gala year
trophy metal | metal | trophy made of the metal | metal in the trophy | name of the trophy metal | raw metal
tent fabric      | fabric     | what the tents use       | fabric of the tents     | name of the tent fabric
camp tree        | tree       | what shelters the camp   | tree over the camp      | name of the camp tree
camp cook        | person     | who cooks at camp        | cook of the camp        | name of the camp cook
lantern metal | metal | lantern of the metal | metal in the lantern | name of the lantern metal | found metal
crossed river    | river      | what the boats crossed   | river for the boats     | name of the crossed river
marker color     | color      | what marks the trail     | color along the trail   | name of the marker color
start year       | year       | when the journey began   | year of departure       | date for the start year
daily grain      | crop       | what fills the pots      | grain in the pots       | name of the daily grain
dried fruit      | fruit      | what the bags hold       | fruit in the bags       | name of the dried fruit
food keeper      | person     | who guards the food      | keeper of the stores    | name of the food keeper
found metal      | metal      | what the digs gave       | metal from the digs     | name of the found metal
rare flower      | flower     | what bloomed in snow     | flower in the snow      | name of the rare flower
find year        | year       | when the digs began      | year of the digs        | date for the find year
tracked animal   | animal     | what left the prints     | animal with the prints  | name of the tracked animal
watched bird     | bird       | what circled above       | bird that circled       | name of the watched bird
lead tracker     | person     | who read the prints      | tracker in charge       | name of the lead tracker
fireside drink   | drink      | what warms the crew      | drink by the fire       | name of the fireside drink
evening music    | instrument | what the crew plays      | instrument of the crew  | name of the evening music
reunion year     | year       | when the crew met again  | year of the reunion     | date for the reunion year
badge bird | bird | badge with the bird | bird on the badge | name of the badge bird | watched bird
""")

DOMAINS: tuple[Domain, ...] = (
    Domain(
        "town",
        (
            "Describe the town of {s} in {n} parts.",
            "Write {n} parts about the town {s}.",
            "Tell me about {s}, a town, in {n} parts.",
        ),
        (
            Section(
                "Farming",
                ("main crop", "orchard fruit"),
                "chief farmer",
                None,
                ("Fields lie all around {s}.", "Most families in {s} farm."),
            ),
            Section(
                "Industry",
                ("mined metal", "woven cloth"),
                "mill year",
                None,
                ("Work starts early in {s}.", "{s} lives by its trades."),
            ),
            Section(
                "Nature",
                ("wild animal", "common tree"),
                "forest keeper",
                None,
                ("Deep woods surround {s}.", "Walkers love {s}."),
            ),
            Section(
                "Culture",
                ("folk instrument", "local drink"),
                "feast year",
                "feast dish",
                ("Evenings in {s} are loud.", "{s} likes to celebrate."),
            ),
            Section(
                "Emblems",
                ("flag color", "crest bird"),
                "crest painter",
                "coin metal",
                ("{s} is proud of its signs.", "The hall of {s} is full of signs."),
            ),
            Section(
                "Places",
                ("nearby river", "park flower"),
                "bridge year",
                None,
                ("There is much to see in {s}.", "A short walk shows {s} well."),
            ),
        ),
    ),
    Domain(
        "company",
        (
            "Describe the company {s} in {n} parts.",
            "Write {n} parts about {s}, a company.",
            "Tell me about the firm {s} in {n} parts.",
        ),
        (
            Section(
                "Products",
                ("raw metal", "lining fabric"),
                "launch year",
                None,
                ("{s} makes fine cases.", "The goods of {s} last long."),
            ),
            Section(
                "Brand",
                ("logo bird", "brand color"),
                "logo artist",
                None,
                ("Everyone knows the look of {s}.", "{s} cares about its image."),
            ),
            Section(
                "Staff",
                ("office drink", "team mascot"),
                "team leader",
                None,
                ("People stay long at {s}.", "The mood at {s} is good."),
            ),
            Section(
                "Campus",
                ("lobby flower", "yard tree"),
                "campus year",
                "statue bird",
                ("The site of {s} is quiet.", "Guests of {s} enter by the gate."),
            ),
            Section(
                "Supply",
                ("bulk grain", "snack fruit"),
                "chief buyer",
                None,
                ("Trucks reach {s} at dawn.", "The kitchen of {s} is large."),
            ),
            Section(
                "Events",
                ("parade music", "ferry river"),
                "gala year",
                "trophy metal",
                ("{s} holds a summer party.", "Once a year {s} goes out."),
            ),
        ),
    ),
    Domain(
        "expedition",
        (
            "Describe the {s} expedition in {n} parts.",
            "Write {n} parts about the journey to {s}.",
            "Tell me in {n} parts how the crew reached {s}.",
        ),
        (
            Section(
                "Camp",
                ("tent fabric", "camp tree"),
                "camp cook",
                "lantern metal",
                ("The camp near {s} was small.", "Life in camp was simple."),
            ),
            Section(
                "Route",
                ("crossed river", "marker color"),
                "start year",
                None,
                ("The way to {s} was long.", "Few maps show {s}."),
            ),
            Section(
                "Food",
                ("daily grain", "dried fruit"),
                "food keeper",
                None,
                ("Food was short before {s}.", "The crew ate twice a day."),
            ),
            Section(
                "Finds",
                ("found metal", "rare flower"),
                "find year",
                None,
                ("The ground at {s} gave much.", "The crew dug at {s}."),
            ),
            Section(
                "Wildlife",
                ("tracked animal", "watched bird"),
                "lead tracker",
                None,
                ("Wild things live near {s}.", "The crew kept watch at {s}."),
            ),
            Section(
                "Evenings",
                ("fireside drink", "evening music"),
                "reunion year",
                "badge bird",
                ("Nights at {s} were cold.", "After dark the crew sat close."),
            ),
        ),
    ),
)
"""Within a domain the twelve core cues have twelve different value types, so core documents never repeat a type."""

OWN_FRAMES = (
    "The {c} {v} comes first.",
    "Here people name the {c} {v}.",
    "For years they have kept the {c} {v}.",
    "Records give the {c} {v}, and few object.",
)
REFERENCE_FRAMES = (
    "All this recalls the {c} {v}.",
    "It goes well with the {c} {v}, they say.",
    "Guides compare it with the {c} {v}.",
    "The {c} {v} is never far away.",
)
OPENING_FRAMES = (
    "Like the {c} {v}, this is well known.",
    "Beside the {c} {v} there is more to tell.",
)
"""In every frame the value follows the last word of the cue, so a trunk of a few layers can learn to copy it."""

FILLERS = (
    "Nobody knows who started it.",
    "The work is slow but steady.",
    "Old people tell long stories.",
    "Children learn this at school.",
    "Much has changed since then.",
    "It costs very little.",
)


def section_of(header: str) -> Section:
    """The section kind with this heading."""
    for domain in DOMAINS:
        for section in domain.sections:
            if section.header == header:
                return section
    known = [section.header for domain in DOMAINS for section in domain.sections]
    raise ValueError(f"`header` is {header!r}; known headings: {', '.join(known)}.")


def values_of(cue: str, heldout: bool | None = None) -> tuple[str, ...]:
    """Values a cue can take; `heldout` picks only the training part (False) or only the held-out part (True)."""
    value_type = CUES[cue].value_type
    if value_type == PERSON:
        given, surnames = (_part(names, heldout) for names in (GIVEN_NAMES, SURNAMES))
        return tuple(f"{first} {last}" for first in given for last in surnames)
    return _part(POOLS[value_type], heldout)


def _part(words: tuple[str, ...], heldout: bool | None) -> tuple[str, ...]:
    if heldout is None:
        return words
    return words[-NUM_HELDOUT_VALUES:] if heldout else words[:-NUM_HELDOUT_VALUES]


def wordings_of(cue: str, heldout: bool) -> tuple[str, ...]:
    """Plan wordings of a cue: those of adapter training, or those kept out of it."""
    wordings = CUES[cue].wordings
    return wordings[-NUM_HELDOUT_WORDINGS:] if heldout else wordings[:-NUM_HELDOUT_WORDINGS]
