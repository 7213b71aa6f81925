"""The world that the demo stories are set in: who lives there, where, with what, and what belongs to what.

Facts only, in literal tables; `stories.py` makes them happen.  Everything is ASCII, so that bytes are characters.
"""

from typing import NamedTuple


class Person(NamedTuple):
    """Somebody with a name; the pronouns go with it through a whole story."""

    name: str
    kind: str
    she: str
    her: str  # possessive
    them: str  # object


class Place(NamedTuple):
    """Somewhere to go: how one says that, what one sees there, and where small things get lost."""

    to: str
    at: str
    sight: str
    spots: tuple[str, ...]


class Break(NamedTuple):
    """A thing that breaks in its own way and is mended with its own tool."""

    thing: str
    harm: str
    tool: str
    mending: str


class Animal(NamedTuple):
    """A shy animal, the food it likes, the sound it makes, and where it lives."""

    animal: str
    food: str
    sound: str
    home: str


class Weather(NamedTuple):
    """Weather that spoils a plan, what it does, and what helps."""

    turns: str
    effect: str
    feels: str
    help: str
    after: str


_GIRLS = (
    "Mia",
    "Anna",
    "Lily",
    "Rosa",
    "Emma",
    "Nora",
    "Ella",
    "Zoe",
    "Clara",
    "Ivy",
    "Ruth",
    "Sara",
    "Lucy",
    "Maya",
    "Tess",
    "Jane",
    "Alma",
    "Hana",
    "Wendy",
    "Poppy",
)
_BOYS = (
    "Tom",
    "Ben",
    "Max",
    "Leo",
    "Sam",
    "Jack",
    "Finn",
    "Oscar",
    "Hugo",
    "Noah",
    "Eli",
    "Dan",
    "Theo",
    "Luke",
    "Adam",
    "Paul",
    "Ravi",
    "Otto",
    "Felix",
    "Hans",
)
_BEASTS = ("rabbit", "fox", "bear", "mouse", "squirrel", "hedgehog", "badger", "otter", "duck", "frog")

PEOPLE = tuple(
    [Person(name, kind, "she", "her", "her") for i, name in enumerate(_GIRLS) for kind in ("girl", _BEASTS[i % 10])]
    + [Person(name, kind, "he", "his", "him") for i, name in enumerate(_BOYS) for kind in ("boy", _BEASTS[-i % 10])]
)

TRAITS = ("kind", "brave", "curious", "clever", "quiet", "cheerful", "patient", "careful", "friendly", "gentle")
COLORS = ("red", "blue", "green", "yellow", "white", "black", "orange", "purple", "silver", "brown")
SIZES = ("small", "big", "tiny", "old", "new", "shiny", "soft", "round", "little", "pretty")
TOYS = (
    "ball",
    "kite",
    "drum",
    "boat",
    "doll",
    "book",
    "whistle",
    "basket",
    "hat",
    "scarf",
    "lantern",
    "map",
    "key",
    "bell",
    "ring",
    "cup",
    "spoon",
    "ribbon",
)
WISHES = (
    "fly over the hills",
    "sail across the sea",
    "see the stars up close",
    "learn how to swim",
    "sing in front of everyone",
    "grow the tallest flower",
    "climb the highest tree",
    "build a house of stones",
)

PLACES = (
    Place(
        "to the park",
        "in the park",
        "The grass was green and the swings were moving in the wind",
        ("under the bench", "behind the fountain", "next to the swings", "in the tall grass"),
    ),
    Place(
        "to the forest",
        "in the forest",
        "The trees were so tall that the path was dark",
        ("under a fallen tree", "behind a mossy rock", "in a heap of leaves", "between the roots of an oak"),
    ),
    Place(
        "to the beach",
        "on the beach",
        "The waves rolled over the sand and left shells behind",
        ("under a wet towel", "behind a big rock", "in a hole in the sand", "next to the old boat"),
    ),
    Place(
        "to the river",
        "by the river",
        "The water ran fast and small fish jumped out of it",
        ("under the bridge", "behind the willow", "between two stones", "in the reeds"),
    ),
    Place(
        "to the market",
        "at the market",
        "People were selling apples, cheese and warm bread",
        ("under a table of apples", "behind the baker's cart", "next to the flower stand", "in an empty box"),
    ),
    Place(
        "to the farm",
        "on the farm",
        "The hens were busy in the yard and the cows were eating hay",
        ("under the cart", "behind the barn", "in the hay", "next to the hen house"),
    ),
    Place(
        "to the garden",
        "in the garden",
        "Bees were flying from one flower to the next",
        ("under the rose bush", "behind the shed", "in the bean patch", "next to the pond"),
    ),
    Place(
        "up the hill",
        "on the hill",
        "From there the houses looked as small as toys",
        ("under a flat stone", "behind the windmill", "in a rabbit hole", "next to the stone wall"),
    ),
    Place(
        "to the library",
        "in the library",
        "There were more books than anyone could count",
        ("under the round table", "behind the tall shelf", "between two thick books", "next to the window"),
    ),
    Place(
        "to the village square",
        "in the village square",
        "Music came from a window above the bakery",
        ("under the old cart", "behind the well", "next to the clock tower", "in a flower pot"),
    ),
)

BREAKS = (
    Break("kite", "tore on a branch", "tape", "put tape over the hole"),
    Break("chair", "lost a leg", "a hammer and nails", "nailed the leg back on"),
    Break("dress", "ripped at the sleeve", "a needle and thread", "sewed the sleeve with small stitches"),
    Break("cup", "fell and cracked", "glue", "glued the pieces together"),
    Break("bicycle", "got a flat tire", "a pump", "pumped the tire until it was hard"),
    Break("boat", "started to leak", "wax", "filled the crack with wax"),
    Break("clock", "stopped ticking", "a tiny key", "wound it up with the tiny key"),
    Break("lamp", "went dark", "a new candle", "put the new candle inside"),
    Break("fence", "broke in the storm", "a rope", "tied the boards together with the rope"),
    Break("drum", "got a hole", "a piece of leather", "stretched the leather over the hole"),
)

ANIMALS = (
    Animal("kitten", "milk", "Meow", "under the porch"),
    Animal("puppy", "a bone", "Woof", "behind the shed"),
    Animal("bird", "some seeds", "Tweet", "in the apple tree"),
    Animal("pony", "a carrot", "Neigh", "in the meadow"),
    Animal("duckling", "some bread", "Quack", "beside the pond"),
    Animal("lamb", "fresh grass", "Baa", "on the hillside"),
    Animal("goat", "an apple", "Maa", "near the old mill"),
    Animal("owl", "a nut", "Hoo", "in the hollow oak"),
)

WEATHERS = (
    Weather("it began to rain", "the path turned to mud", "wet", "a big umbrella", "a rainbow stood over the houses"),
    Weather("it began to snow", "everything turned white", "cold", "a warm coat", "they built a snowman together"),
    Weather("a strong wind came up", "leaves flew everywhere", "tired", "a strong hand to hold", "the air was clear"),
    Weather(
        "the sun grew very hot", "the road was dusty", "thirsty", "a bottle of cold water", "the evening was cool"
    ),
    Weather("thick fog came in", "the houses disappeared", "lost", "a bright lantern", "the first star came out"),
)

FEARS = (
    ("the dark", "the hall was as black as ink", "held up a lamp", "walked through the hall"),
    ("deep water", "the lake looked cold and deep", "held out a hand", "swam to the other side"),
    ("high places", "the ladder seemed to reach the sky", "climbed right behind", "climbed to the top"),
    ("thunder", "the sky rumbled and flashed", "sang a loud song", "sang along until it was over"),
    ("big dogs", "a large dog was sitting at the gate", "spoke softly to it", "patted the dog on its head"),
    ("speaking aloud", "the whole school was waiting", "smiled from the first row", "read the poem to the end"),
)

FRUITS = ("apples", "pears", "plums", "cherries", "cookies", "eggs", "nuts", "buns")
NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve")
TREATS = ("a honey cake", "an apple pie", "a pot of soup", "a loaf of bread", "a plate of pancakes", "a berry tart")
TRADES = (
    ("an egg", "the baker", "needed an egg for a cake", "a loaf of bread"),
    ("a loaf of bread", "the fisherman", "had not eaten all day", "a silver fish"),
    ("a silver fish", "the cook", "wanted fish for the soup", "a jar of honey"),
    ("a jar of honey", "the old beekeeper's wife", "had no honey left", "a ball of wool"),
    ("a ball of wool", "the weaver", "had run out of wool", "a warm blanket"),
    ("a warm blanket", "the night watchman", "was always cold", "a little brass bell"),
    ("a little brass bell", "the shepherd", "had lost the bell of his goat", "a cup of fresh milk"),
)
WARNINGS = (
    ("touch the hot pot", "touched the hot pot", "burned a finger"),
    ("climb the wet rocks", "climbed the wet rocks", "slipped and hurt a knee"),
    ("eat all the sweets", "ate all the sweets", "got a stomach ache"),
    ("open the gate", "opened the gate", "let the sheep run away"),
    ("play with the clay pot", "played with the clay pot", "broke it into pieces"),
    ("walk on the thin ice", "walked on the thin ice", "fell into the cold water"),
)
ELDERS = (("mother", "she"), ("father", "he"), ("grandmother", "she"), ("grandfather", "he"))
