"""Short stories from a grammar: ten plots, each a chain of causes, told of people who keep their names and pronouns.

What happens follows from what was said (the tool fits the harm, sums come out right, the thing is found where the
friend saw it), so a model of a few million parameters has something to learn beyond spelling.  Not literature: the
words are in `world.py` and here, and return in ever new combinations.
"""

from collections.abc import Callable, Sequence
from random import Random
from typing import TypeVar
from zlib import crc32

from llmlab.data.demo import world
from llmlab.data.demo.world import NUMBERS, PEOPLE, Person

VALIDATION_IN = 20  # one cast in so many is told in the validation split only

Choice = TypeVar("Choice")
Facts = dict[str, str]
Step = tuple[float, tuple[str, ...]]  # how often it is told, and in which words


def write_row(random: Random, *, validation: bool) -> dict[str, str]:
    """Returns a row with one story."""
    return {"text": tell(random, validation=validation)}


def tell(random: Random, *, validation: bool) -> str:
    """Returns one story; those of the validation split have a plot, hero and friend that training never combines."""
    while True:
        number, hero, friend = int(random.random() * len(PLOTS)), pick(random, PEOPLE), pick(random, PEOPLE)
        cast = crc32(f"{number} {hero.name} {friend.name}".encode())
        if hero.name != friend.name and (cast % VALIDATION_IN == 0) is validation:
            break
    return narrate(random, number, invent(random, number, hero, friend))


def invent(random: Random, number: int, hero: Person, friend: Person) -> Facts:
    """Returns what happens to these two in a plot of this number: the values of every slot of its steps."""
    facts = {**_facts_of(hero, ""), **_facts_of(friend, "friend_"), "trait": pick(random, world.TRAITS)}
    facts.update(PLOTS[number][0](random, facts))
    return facts


def narrate(random: Random, number: int, facts: Facts) -> str:
    """Returns the story of a plot's facts in words chosen at random; what is always said, is said."""
    steps = (*OPENING, *PLOTS[number][1], *ENDING)
    told = [pick(random, wordings) for chance, wordings in steps if random.random() < chance]
    return " ".join(told).format_map(facts)


def pick(random: Random, choices: Sequence[Choice]) -> Choice:
    return choices[int(random.random() * len(choices))]  # as fair as `choice` for such short lists, and faster


def other(random: Random, choices: Sequence[Choice], than: Choice) -> Choice:
    return pick(random, [choice for choice in choices if choice is not than])


def a(noun: str) -> str:
    return f"an {noun}" if noun[0] in "aeiou" else f"a {noun}"


def _facts_of(person: Person, prefix: str) -> Facts:
    name, kind, she, her, them = person
    return {
        f"{prefix}name": name,
        f"{prefix}kind": kind,
        f"{prefix}a_kind": a(kind),
        f"{prefix}she": she,
        f"{prefix}She": she.capitalize(),
        f"{prefix}her": her,
        f"{prefix}Her": her.capitalize(),
        f"{prefix}them": them,
    }


def _steps(text: str) -> tuple[Step, ...]:
    """Reads steps that begin with a dash: wordings between bars, behind a `60%` where not always told."""
    steps = []
    for step in text.replace("{SAD}", SAD).split("    - ")[1:]:
        head, percent, rest = step.partition("% ")
        chance, words = (int(head) / 100, rest) if percent else (1.0, step)
        steps.append((chance, tuple(" ".join(wording.split()) for wording in words.split("|"))))
    return tuple(steps)


SAD = (
    '{name} was very sad and began to cry. | "Oh no!" said {name}. "What shall I do now?" | '
    "{name} sat down and did not know what to do."
)

# Every plot begins in the middle of a sentence: "One day ...".
OPENING = _steps("""
    - Once upon a time there was a {trait} {kind} called {name}. | {name} was a {trait} little {kind}. | There
      once lived {a_kind} whose name was {name}. Everyone said that {name} was very {trait}. | In a small
      village lived {name}, a {trait} {kind}.
    - One day | One morning | One sunny afternoon | Last spring
""")
ENDING = _steps("""
    - From that day on {name} and {friend_name} were the best of friends. | {name} went home with a smile and
      told {her} mother everything. | That night {name} slept well and dreamed of {friend_name}. | And {name}
      never forgot what {friend_name} had done. | "This was a good day," said {name}, and {friend_name}
      thought so too. | They laughed about it for a long time. The end.
""")


def lost(random: Random, facts: Facts) -> Facts:
    place = pick(random, world.PLACES)
    spot = pick(random, place.spots)
    return {
        "thing": pick(random, world.TOYS),
        "look": pick(random, pick(random, (world.COLORS, world.SIZES))),
        "to": place.to,
        "sight": place.sight,
        "spot": spot,
        "elsewhere": other(random, place.spots, spot),
    }


LOST = _steps("""
    - {she} went {to} with {her} {look} {thing}. | {name} took {her} {look} {thing} and went {to}.
    - {sight}.
    - {name} played for a long time, but when it was time to go home, the {thing} was gone. | Then {name} put
      the {thing} down for a moment, and when {she} turned around it was gone.
    - 60% {name} looked {elsewhere}, but the {thing} was not there.
    - {SAD}
    - Just then {friend_name} the {friend_kind} came by. "Have you seen my {look} {thing}?" asked {name}. |
      "What is wrong?" asked {friend_name}, {friend_a_kind} from next door. "I lost my {look} {thing}," said
      {name}.
    - "Yes! I saw something {look} {spot}," said {friend_name}. | "Did you look {spot}?" asked {friend_name}.
      "I saw something {look} there."
    - They looked {spot}, and there was the {thing}! | {name} ran and looked {spot}. The {thing} was really
      there.
    - "Thank you, {friend_name}!" said {name} and held the {look} {thing} tight. | {name} was so happy that
      {she} let {friend_name} play with the {thing} too.
""")


def broken(random: Random, facts: Facts) -> Facts:
    item = pick(random, world.BREAKS)
    wrong = other(random, world.BREAKS, item)
    return {
        "color": pick(random, world.COLORS),
        "thing": item.thing,
        "harm": item.harm,
        "tool": item.tool,
        "mending": item.mending,
        "wrong_tool": wrong.tool,
        "wrong_thing": wrong.thing,
    }


BROKEN = _steps("""
    - {name}'s {color} {thing} {harm}. | something bad happened: {her} {color} {thing} {harm}.
    - {SAD}
    - {friend_name} the {friend_kind} heard it and came over. "Do not worry," {friend_she} said. "We can mend
      it." | "Let me see," said {friend_name}, {friend_a_kind} who was good with {friend_her} hands.
    - 50% "Will {wrong_tool} help?" asked {name}. "No," said {friend_name}, "that is for the {wrong_thing}.
      The {thing} needs {tool}."
    - {friend_name} went to get {tool}. Together they {mending}. | So {name} ran home and brought {tool}, and
      {friend_name} {mending}.
    - Soon the {thing} was as good as new. {name} clapped {her} hands. | "It works again!" cried {name}, and
      the {color} {thing} looked better than before.
""")


def shared(random: Random, facts: Facts) -> Facts:
    place = pick(random, world.PLACES)
    total = 5 + int(random.random() * 8)
    given = 1 + int(random.random() * (total - 3))
    return {
        "fruit": pick(random, world.FRUITS),
        "to": place.to,
        "at": place.at,
        "sight": place.sight,
        "total": NUMBERS[total],
        "given": NUMBERS[given],
        "left": NUMBERS[total - given],
        "last": NUMBERS[total - given - 1],
    }


SHARED = _steps("""
    - {she} had {total} {fruit} in a basket and walked {to}. | {name} walked {to}. In {her} bag {she} had
      {total} {fruit}.
    - {sight}. | It was quiet {at}.
    - There {she} met {friend_name} the {friend_kind}, who had nothing to eat. | {friend_name}, a hungry
      {friend_kind}, was sitting there all alone.
    - "I am so hungry," said {friend_name}. "Take {given} of my {fruit}," said {name}. | "May I have some
      {fruit}?" asked {friend_name}. "Of course," said {name} and gave {friend_them} {given}.
    - Now {friend_name} had {given} of the {fruit} and {name} had {left}. | {name} counted what was left:
      {left}.
    - 60% {name} ate one of {her} {fruit}, and then {she} had {last}. {friend_name} ate and felt much better.
    - "Food tastes better when we share it," said {friend_name}. | "Next time I will bring something for you,"
      said {friend_name}.
""")


def weather(random: Random, facts: Facts) -> Facts:
    change, place = pick(random, world.WEATHERS), pick(random, world.PLACES)
    return {**change._asdict(), "to": place.to, "at": place.at, "sight": place.sight}


WEATHER = _steps("""
    - {name} wanted to go {to} with {friend_name} the {friend_kind}. | {she} set out {to}. {friend_name},
      {friend_a_kind}, was going to come later.
    - But on the way {turns}, and {effect}. | All was well at first. Then {turns}, and soon {effect}.
    - "I am so {feels}," said {name}. | {name} was {feels} and did not know what to do.
    - "Look what I have brought," called {friend_name}. It was {help}. | Luckily {friend_name} had thought of
      {help} and came running.
    - With {help} it was not so bad, and when it was over, {after}. | They shared {help} until it was over.
      Then {after}.
    - At last they were {at}. {sight}.
""")


def fear(random: Random, facts: Facts) -> Facts:
    what, sight, helped, deed = pick(random, world.FEARS)
    return {"what": what, "sight": sight, "Sight": sight.capitalize(), "helped": helped, "deed": deed}


FEAR = _steps("""
    - {she} had to be brave, because {name} was afraid of {what}, and {sight}. | everyone was outside, but
      {name} stayed behind. {Sight}, and {she} was afraid of {what}.
    - "I cannot do it," {she} whispered. | "I am too scared," said {name}, and {her} knees were shaking.
    - "I was afraid of {what} too, once," said {friend_name} the {friend_kind}. "I will stay with you." | "You
      are not alone," said {friend_name}, {friend_a_kind} who was older. "Come with me."
    - {friend_name} {helped}.
    - {name} took a deep breath and {deed}. | Step by step {name} grew calm, and in the end {she} {deed}.
    - "I did it!" cried {name}. {She} was not afraid of {what} any more. | "See?" said {friend_name}. "You
      were brave." {name} felt very proud.
""")


def animal(random: Random, facts: Facts) -> Facts:
    pet, color = pick(random, world.ANIMALS), pick(random, world.COLORS)
    return {
        **pet._asdict(),
        "pet": pet.animal,
        "a_pet": a(pet.animal),
        "A_pet": a(pet.animal).capitalize(),
        "color": color,
        "a_color": a(color),
        "wrong": other(random, world.ANIMALS, pet).food,
    }


ANIMAL = _steps("""
    - {name} heard a sound. "{sound}! {sound}!" It came from a little {color} {pet} {home}. | {she} found
      {a_color} {pet} {home}. "{sound}," it said in a small voice.
    - The {pet} was shy and would not come out. | {name} wanted to pet it, but the {pet} ran away and hid.
    - 60% {name} offered it {wrong}, but the {pet} did not like that.
    - "{A_pet} likes {food}," said {friend_name} the {friend_kind}. | {friend_name} the {friend_kind} knew
      what to do. "Bring {food}," {friend_she} said, "and wait."
    - So {name} brought {food} and sat down without a word. | {name} put {food} on the ground and took three
      steps back.
    - Slowly the {pet} came and ate it all up. "{sound}!" it said. | After a while the {color} {pet} came out,
      ate, and put its head on {name}'s knee.
""")


def race(random: Random, facts: Facts) -> Facts:
    runners = [{key: facts[prefix + key] for key in ("name", "she", "them")} for prefix in ("", "friend_")]
    quick, steady = runners if random.random() < 0.5 else reversed(runners)
    return {
        "quick": quick["name"],
        "quick_she": quick["she"],
        "quick_them": quick["them"],
        "steady": steady["name"],
        "steady_she": steady["she"],
        "to": pick(random, world.PLACES).to,
        "prize": pick(random, world.TREATS),
    }


RACE = _steps("""
    - there was a race {to}, and the prize was {prize}. | the children held a race {to}. The winner would get
      {prize}.
    - {name} wanted to run against {friend_name} the {friend_kind}.
    - "I am the fastest of all," said {quick}. "You can never beat me." | {quick} laughed. Everyone knew that
      {quick} was faster than {steady}.
    - They started, and {quick} was soon far ahead. So {quick_she} lay down under a tree to rest. | {quick}
      ran like the wind. Half way there {quick_she} stopped to pick berries and fell asleep.
    - But {steady} walked on, step by step, and never stopped. | {steady} was slow, but {steady_she} did not
      rest once.
    - When {quick} woke up it was too late. {steady} had won {prize}. | {steady} came in first and won
      {prize}. {quick} came in last.
    - "You did well," said {quick}. "Next time I will not sleep." {steady} gave {quick_them} half of the
      prize. | {steady} smiled and shared the prize with {quick}. "Slow and steady," {steady_she} said.
""")


def warned(random: Random, facts: Facts) -> Facts:
    deed, did, harm = pick(random, world.WARNINGS)
    elder, elder_she = pick(random, world.ELDERS)
    return {"deed": deed, "did": did, "harm": harm, "elder": elder, "Elder_she": elder_she.capitalize()}


WARNED = _steps("""
    - {name}'s {elder} said, "Please do not {deed}, {name}."
    - "I will not," said {name}. But when nobody was looking, {she} {did}. | But {name} wanted to know what
      would happen. As soon as {her} {elder} was gone, {she} {did}.
    - At once {name} {harm}.
    - {SAD}
    - {friend_name} the {friend_kind} saw it. "You must tell your {elder}," {friend_she} said. | "It is best
      to tell the truth," said {friend_name}, a wise {friend_kind}.
    - So {name} went home. "I am sorry," {she} said. "You told me not to {deed}, and I did not listen." |
      {name} went to {her} {elder} and said, "I {did}. I am sorry."
    - "I am glad that you told me," said {her} {elder} and gave {name} a hug. | {Her} {elder} was not angry.
      {Elder_she} helped {them}, and all was well.
""")


def trade(random: Random, facts: Facts) -> Facts:
    start = int(random.random() * (len(world.TRADES) - 1))
    (has, who, why, gets), (_, next_who, next_why, goal) = world.TRADES[start : start + 2]
    return {
        "has": has, "who": who, "why": why, "gets": gets, "next_who": next_who, "next_why": next_why, "goal": goal
    }  # fmt: skip


TRADE = _steps("""
    - {friend_name} the {friend_kind} said, "I wish I had {goal}." {name} had only {has}. | {name} wanted to
      give {goal} to {friend_name} the {friend_kind}, but all {she} had was {has}.
    - {She} went to the village to see what could be done.
    - There {she} met {who}, who {why}. {name} gave away {has} and got {gets}. | First came {who}, who {why}.
      "I will give you {gets} for {has}," said {who}, and {name} agreed.
    - Then {she} met {next_who}, who {next_why}. {name} gave away {gets} and got {goal}. | Next came
      {next_who}, who {next_why}. "I will give you {goal} for {gets}," said {next_who}, and {name} agreed.
    - In the evening {name} came to {friend_name}. "Here is {goal}," {she} said. | So {name} could bring
      {goal} to {friend_name}, who could not believe it.
""")


def wish(random: Random, facts: Facts) -> Facts:
    place = pick(random, world.PLACES)
    return {
        "dream": pick(random, world.WISHES),
        "treat": pick(random, world.TREATS),
        "to": place.to,
        "sight": place.sight,
        "days": NUMBERS[2 + int(random.random() * 8)],
    }


WISH = _steps("""
    - {name} said, "I want to {dream}." | {name} could think of only one thing: {she} wanted to {dream}.
    - "Nobody can do that," said {friend_name} the {friend_kind}. | {friend_name} the {friend_kind} laughed.
      "You are much too small," {friend_she} said.
    - For {days} days {name} went {to} and tried. {sight}.
    - Every day it went wrong, but {she} did not give up. | Again and again {she} failed, and again and again
      {she} got up.
    - After {days} days {friend_name} was sorry and came to help with {treat}.
    - Together they made a plan, and at last {name} could {dream}. | They ate {treat} and tried once more.
      "Now I can {dream}!" cried {name}.
    - "I was wrong," said {friend_name}. "You can do it if you try."
""")

PLOTS: tuple[tuple[Callable[[Random, Facts], Facts], tuple[Step, ...]], ...] = (
    (lost, LOST),
    (broken, BROKEN),
    (shared, SHARED),
    (weather, WEATHER),
    (fear, FEAR),
    (animal, ANIMAL),
    (race, RACE),
    (warned, WARNED),
    (trade, TRADE),
    (wish, WISH),
)
