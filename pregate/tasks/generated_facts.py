"""The phrases of the generated set: kinds of fact, how each is told and asked, and the values it can take.

Data only. In a statement or question `{it}` is the subject, in a statement `{x}` the value. No value is a word of a
phrase or a value of another kind, so an answer stands in its context exactly once.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Kind:
    """One kind of fact; with `held_out`, validation draws from values that training never sees."""

    name: str
    statements: tuple[str, ...]
    questions: tuple[str, ...]
    values: list[str]
    held_out: bool = False


def _words(text: str) -> list[str]:
    return text.split()


def _pairs(first: str, second: str) -> list[str]:
    return [f"{a} {b}" for a in first.split() for b in second.split()]


SUBJECT_WORDS = _words(
    "Arden Birchley Calder Dunmore Elsworth Farrow Glenhow Hartley Ingram Jarrow Kelby Lorne "
    "Marlow Norwood Orrin Penrose Quarley Ravens Selwyn Thorne Ulver Varley Wexley Yarrow"
)
SUBJECT_NOUNS = _words("Abbey Academy Club Guild Hall House Inn Library Lodge Mill Museum Theatre")

KINDS = [
    Kind(
        "founded",
        ("{it} was founded in {x}.", "{it} dates from {x}.", "{it} first opened in the year {x}."),
        ("When was {it} founded?", "In what year did {it} first open?", "What year does {it} date from?"),
        [str(year) for year in range(1702, 1950, 8)],
    ),
    Kind(
        "located",
        ("{it} is located in {x}.", "{it} lies in the town of {x}.", "{it} stands in the centre of {x}."),
        ("Where is {it} located?", "In which town does {it} lie?", "What town is {it} in?"),
        _words(
            "Aldham Barrowby Corley Dunwich Elstow Fenwick Garsdale Hexton Ilkeston Kirkdale Langport Malden "
            "Netherby Oakham Preston Radley Saxby Tilbury Upton Whitby Yardley Ashford Bexhill Cromer Denby "
            "Evesham Frome Goole"
        ),
    ),
    Kind(
        "leader",
        ("{it} is led by {x}.", "{it} has {x} as its director.", "{it} is under the care of {x}."),
        ("Who leads {it}?", "Who is the director of {it}?", "By whom is {it} led?"),
        _pairs(
            "Ada Bruno Clara David Edith Felix Greta Hugo Irene Jonas Karin Leon Mabel Nils Olga Peter Rosa Simon",
            "Abbott Becker Carver Dalton Ellis Fischer Grant Holm Jensen Keller Lang Moore Novak Olsen Price Quinn",
        ),
        held_out=True,
    ),
    Kind(
        "craft",
        ("{it} is known for its {x}.", "{it} is famous for {x}.", "{it} made its reputation with {x}."),
        ("What is {it} known for?", "For what is {it} famous?", "With what did {it} make its reputation?"),
        _words(
            "pottery weaving printing carving glassware clocks candles baskets bells lace rugs saddles masks puppets "
            "mosaics quilts ropes knives mirrors lanterns globes kites combs jewels"
        ),
    ),
    Kind(
        "colour",
        ("{it} is painted {x}.", "{it} has walls of {x}.", "{it} has a front that is coloured {x}."),
        ("What colour is {it} painted?", "In what colour are the walls of {it}?", "Which colour has {it}?"),
        _pairs("pale dark bright deep dull warm", "blue green red yellow grey brown pink white"),
    ),
    Kind(
        "members",
        ("{it} has {x} members.", "{it} counts {x} people as members.", "{it} is made up of {x} members."),
        (
            "How many members does {it} have?",
            "How many people belong to {it}?",
            "What is the number of members of {it}?",
        ),
        [str(number) for number in range(203, 1000, 28)],
    ),
    Kind(
        "emblem",
        (
            "{it} bears the emblem of the {x}.",
            "{it} has {x} figures on its shield.",
            "{it} took the {x} for its sign.",
        ),
        (
            "What animal is the emblem of {it}?",
            "Which animal is on the shield of {it}?",
            "Which animal is the sign of {it}?",
        ),
        _words(
            "marten falcon badger heron stag wolf moose fox swan eagle raven hare boar dolphin lion owl trout horse "
            "beetle salmon crane lynx toad spider"
        ),
    ),
    Kind(
        "festival",
        ("{it} holds a festival in {x}.", "{it} celebrates every {x}.", "{it} invites its guests in {x}."),
        ("When does {it} hold a festival?", "In what month does {it} celebrate?", "When does {it} invite guests?"),
        _pairs(
            "early mid late", "January February March April May June July August September October November December"
        ),
    ),
    Kind(
        "garden",
        ("{it} grows {x} in the garden.", "{it} keeps a garden full of {x}.", "{it} planted {x} around its yard."),
        (
            "What grows in the garden of {it}?",
            "What is the garden of {it} full of?",
            "What did {it} plant in its yard?",
        ),
        _words(
            "roses lilies tulips apples pears plums cherries figs beans leeks onions pumpkins ferns ivy heather mint "
            "thyme basil barley hops nettles poppies melons"
        ),
    ),
    Kind(
        "meal",
        ("{it} serves {x} to visitors.", "{it} offers a supper of {x}.", "{it} cooks {x} at noon."),
        ("What does {it} serve to visitors?", "Which supper does {it} offer?", "What does {it} cook at noon?"),
        _words(
            "soup bread stew porridge pancakes noodles dumplings pudding cheese bacon sausages waffles curry trifle "
            "scones toast omelettes herring oysters biscuits"
        ),
    ),
    Kind(
        "language",
        ("{it} teaches in {x}.", "{it} keeps its records in {x}.", "{it} uses {x} for its letters."),
        (
            "What language does {it} teach in?",
            "In which language are the records of {it}?",
            "Which language does {it} use for letters?",
        ),
        _words(
            "Latin Greek Welsh Danish Dutch Polish Czech Finnish French German Spanish Italian Russian Arabic Hebrew "
            "Persian Turkish Basque Breton Swedish"
        ),
    ),
    Kind(
        "instrument",
        ("{it} owns an old {x}.", "{it} is proud of its {x} music.", "{it} plays the {x} on Sundays."),
        ("What instrument does {it} own?", "Of which music is {it} proud?", "What does {it} play on Sundays?"),
        _words(
            "violin cello harp flute oboe organ piano trumpet tuba guitar lute drum banjo viola bassoon cornet zither"
        ),
    ),
]
