"""What the simulated crowd asks: prompts to judge, and held-out ones about other subjects.

Nine tasks, each a few templates over subjects. No subject of a held-out prompt occurs in a judged
one, and problems and texts that are put together differ in their patterns too.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final


@dataclass(frozen=True, slots=True)
class Prompt:
    """One question to the model: the text, its task, and the subject that no other side has."""

    task: str
    subject: str
    text: str


def _list(text: str) -> list[str]:
    return [part.strip() for part in text.replace("\n", " ").split(",")]


_THINGS_JUDGED = _list("""
    a glacier, a volcano, a rainbow, a compass, a bicycle, a thermostat, a telescope, a magnet,
    a battery, a refrigerator, a lighthouse, a submarine, a windmill, a greenhouse, a vaccine, a
    heartbeat, a fossil, a comet, a desert, a coral reef, an earthquake, a tornado, a waterfall,
    a rainforest, a beehive, a spider web, a cocoon, a migration, a shadow, an echo, a
    dictionary, a parliament, a court, a budget, a loan, an insurance, a contract, a passport, a
    vote, a museum, an orchestra, a sonnet, a fairy tale, a violin, a piano, a novel, a statue,
    a mosaic, a sundial, a calendar, a search engine, a password, a spreadsheet, a browser, a
    robot, a satellite, a printer, a camera, a keyboard, a microphone
""")
_THINGS_HELD_OUT = _list("""
    a river delta, a hurricane, a microscope, a solar panel, a sewing machine, a parachute, a
    thunderstorm, a mushroom, a kidney, an eclipse, a tide, a bridge, a trade union, a mortgage,
    a newspaper, an opera, a proverb, a firewall, a database, an elevator
""")
_ACTIVITIES_JUDGED = _list("""
    boil an egg, iron a shirt, plant tomatoes, change a flat tyre, wash a wool jumper, write a
    thank-you note, tie a scarf, bake bread, paint a wall, clean a window, sharpen a knife, pack
    a suitcase, fold a paper boat, learn to juggle, train for a long run, read a road map, set
    up a tent, light a campfire, brew a pot of tea, make pancakes, cook rice, peel garlic, keep
    a diary, plan a birthday party, write a poem, draw a face, memorise a speech, prepare for an
    interview, save money, sell an old bicycle, repair a zip, sew on a button, hang a picture,
    unblock a sink, descale a kettle, polish shoes, prune a rose bush, water house plants,
    compost kitchen waste, bathe a dog, teach a child to swim, calm a baby, organise a
    bookshelf, back up a laptop, take a good photo, record a podcast, edit a video, make a
    budget, find a cheap flight, apply for a library card, grow basil, store potatoes, freeze
    berries, make soup, whip cream, choose a melon, clean a barbecue, wrap a present, write an
    invitation, build a bird house
""")
_ACTIVITIES_HELD_OUT = _list("""
    remove a coffee stain, assemble a wardrobe, poach a salmon, knit a hat, play chess, ride a
    horse, grow strawberries, clean a fish tank, write a cover letter, dry herbs, fix a dripping
    tap, make candles, start a blog, dance a waltz, fly a kite, paddle a canoe, roast a chicken,
    choose a mattress, catch a trout, learn Greek, insulate an attic, mend a fence, cut a
    fringe, tune a guitar
""")
_SITUATIONS_JUDGED = _list("""
    I cannot fall asleep at night, my neighbour plays loud music, I forgot a friend's birthday,
    my phone battery empties too fast, I am nervous about my first day at work, my plants keep
    dying, I spend too much on lunch, my back hurts after sitting, I lost my keys, my train was
    cancelled, I argue with my brother a lot, I want to drink less coffee, my child does not
    like vegetables, I feel tired every afternoon, my inbox is full, I have too many clothes, my
    flat is always cold, I keep missing deadlines, I moved to a new city and know nobody, I want
    to read more, my cat scratches the sofa, I burned the rice again, my bicycle was stolen, my
    shoes are wet, I am bored on Sundays, I cannot remember names, my handwriting is hard to
    read, I have to speak in front of a crowd, my boss never replies, I am afraid of flying, my
    computer is slow, I want to eat less sugar, my friend is sad, I broke a borrowed mug, I have
    an exam next week, my hands are cold in winter, I want to save water, my roommate is messy,
    I get distracted by my phone, I need a gift for my grandmother
""")
_SITUATIONS_HELD_OUT = _list("""
    my dog barks at visitors, I dropped my wallet in a taxi, I feel lonely at the office, my
    garden is full of snails, I want to quit smoking, my glasses fog up, I have to move house,
    my son hates homework, I caught a cold before a trip, my car will not start, I owe money to
    a cousin, I want to get up earlier, my bread never rises, I am stuck in a queue for hours,
    my team does not talk to each other, I spilled ink on the carpet
""")
_PAIRS_JUDGED = _list("""
    weather and climate, a lake and a pond, butter and margarine, a frog and a toad, a violin
    and a viola, tea and coffee, a city and a village, a planet and a star, a virus and a
    bacterium, jam and jelly, a crocodile and an alligator, a hill and a mountain, a novel and a
    short story, cotton and wool, a bus and a tram, renting and buying a home, a laptop and a
    tablet, cash and cards, a moth and a butterfly, speed and acceleration, a fruit and a
    vegetable, a noun and a verb, a lawyer and a judge, a doctor and a nurse, a democracy and a
    monarchy, a simile and a metaphor, an atom and a molecule, rain and hail, a donkey and a
    mule, a sweater and a jacket, paper and cardboard, a cake and a pie, gold and brass, salt
    and pepper, a rabbit and a hare, cycling and running, a fork and a spoon, sugar and honey, a
    sofa and an armchair, a street and an avenue, a lemon and a lime, a debit and a credit, a
    curtain and a blind, a letter and a parcel, mass and volume
""")
_PAIRS_HELD_OUT = _list("""
    a turtle and a tortoise, plaster and concrete, a ferry and a yacht, a wolf and a fox, a
    hotel and a hostel, an onion and a shallot, yoga and pilates, a comedy and a tragedy, a
    raven and a crow, a seal and a sea lion, oats and quinoa, silver and platinum, a drum and a
    cymbal, a nut and a bolt, an apple and a pear, a college and an academy, steam and smoke, a
    stamp and a seal ring
""")
_PEOPLE_JUDGED = _list("""
    my sister, the baker, our teacher, the old farmer, a young nurse, the postman, her uncle,
    the painter, our neighbour
""")
_PEOPLE_HELD_OUT = _list("""
    his grandfather, the fisherman, a tall waiter, the pharmacist, their cousin, the shepherd
""")
_DOINGS_JUDGED = _list("""
    is looking for a quiet place to read, has bought a red umbrella, sings every morning, wants
    to learn how to swim, arrived too late for dinner
""")
_DOINGS_HELD_OUT = _list("""
    lives beside an empty theatre, sold three wooden boats, never drinks milk after lunch
""")
_PLACES_JUDGED = _list("""
    library, swimming pool, bakery, town hall, market, cinema, sports club, station, park
""")
_PLACES_HELD_OUT = _list("zoo, chapel, tool shop, harbour, kindergarten, ice rink")
_EVENTS_JUDGED = (
    "will stay open until ten in the evening from Monday, because many students asked for it",
    "was closed for two weeks after a pipe had burst, and visitors were sent home with a voucher",
    "has a new roof that was paid for by donations, although the council had promised the money",
    "celebrates its hundredth year with free entry, a concert, and an exhibition of old photos",
    "will be run by volunteers next year, since the owner is retiring and nobody wanted to buy it",
)
_EVENTS_HELD_OUT = (
    "lost a third of its guests last winter, so the manager lowered prices and began to advertise",
    "got a ramp for wheelchairs, a second door, and brighter lamps after years of complaints",
    "burned down on Friday night, but nobody was hurt and the firemen saved most of the furniture",
)
_GOODS_JUDGED = _list("marbles, pencils, apples, coins, stickers, books, shells, cards, cookies")
_GOODS_HELD_OUT = _list("balloons, carrots, bricks, buttons, lamps, tickets")
_PROBLEMS_JUDGED = (
    "Anna has {a} {goods} and gives {b} of them away. How many {goods} does she have left?",
    "A box holds {b} {goods}. How many {goods} are in {c} boxes?",
    "Tom has {b} {goods} and finds {a} more. How many {goods} does Tom have now?",
    "If {c} children share {d} {goods} equally, how many {goods} does each child get?",
    "Mia has more {goods} than Ben, and Ben has more than Eva. Who has the fewest {goods}?",
)
_PROBLEMS_HELD_OUT = (
    "A shop sells {b} {goods} every day. How long do {e} {goods} last?",
    "Half of the {e} {goods} in a shed are broken. How many {goods} are whole?",
    "Leo pays {c} euros for each of {b} {goods}. How much does Leo pay in all?",
)
_LANGUAGES = ("French", "Spanish", "German")


def _about_things(things: list[str]) -> Iterator[Prompt]:
    asks = ("Explain in simple words how people use {0}.", "Explain why {0} matters.")
    lists = ("List a few facts about {0}.", "Name some things that one should know about {0}.")
    for number, thing in enumerate(things):
        subject = thing.partition(" ")[2]
        yield Prompt("question", subject, f"What is {thing}?")
        yield Prompt("explanation", subject, asks[number % 2].format(thing))
        yield Prompt("list", subject, lists[number % 2].format(thing))


def _about_doing(activities: list[str], situations: list[str]) -> Iterator[Prompt]:
    for number, activity in enumerate(activities):
        ask = ("How do I {}?", "What is the best way to {}?")[number % 2]
        yield Prompt("how-to", activity, ask.format(activity))
    for number, situation in enumerate(situations):
        ask = ("What should I do?", "Do you have any advice?")[number % 2]
        yield Prompt("advice", situation, f"{situation[0].upper()}{situation[1:]}. {ask}")


def _about_pairs(pairs: list[str]) -> Iterator[Prompt]:
    for number, pair in enumerate(pairs):
        ask = ("What is the difference between {}?", "Compare {}.")[number % 2]
        yield Prompt("comparison", pair, ask.format(pair))


def _about_texts(
    people: list[str], doings: list[str], places: list[str], events: tuple[str, ...]
) -> Iterator[Prompt]:
    for number, person in enumerate(people):
        for turn, doing in enumerate(doings):
            language = _LANGUAGES[(number + turn) % 3]
            sentence = f"{person[0].upper()}{person[1:]} {doing}."
            yield Prompt("translation", person, f'Translate into {language}: "{sentence}"')
    for place in places:
        for event in events:
            text = f"The {place} in our town {event}."
            yield Prompt("summary", place, f'Summarise this in a few words: "{text}"')


def _about_numbers(goods: list[str], problems: tuple[str, ...]) -> Iterator[Prompt]:
    for number, good in enumerate(goods):
        few, boxes = 4 + number, 2 + number % 5
        values = {"a": 15 + 3 * number, "b": few, "c": boxes, "d": boxes * few, "e": 6 * few}
        for problem in problems:
            yield Prompt("reasoning", good, problem.format(goods=good, **values))


JUDGED: Final = (
    *_about_things(_THINGS_JUDGED),
    *_about_doing(_ACTIVITIES_JUDGED, _SITUATIONS_JUDGED),
    *_about_pairs(_PAIRS_JUDGED),
    *_about_texts(_PEOPLE_JUDGED, _DOINGS_JUDGED, _PLACES_JUDGED, _EVENTS_JUDGED),
    *_about_numbers(_GOODS_JUDGED, _PROBLEMS_JUDGED),
)
HELD_OUT: Final = (
    *_about_things(_THINGS_HELD_OUT),
    *_about_doing(_ACTIVITIES_HELD_OUT, _SITUATIONS_HELD_OUT),
    *_about_pairs(_PAIRS_HELD_OUT),
    *_about_texts(_PEOPLE_HELD_OUT, _DOINGS_HELD_OUT, _PLACES_HELD_OUT, _EVENTS_HELD_OUT),
    *_about_numbers(_GOODS_HELD_OUT, _PROBLEMS_HELD_OUT),
)
