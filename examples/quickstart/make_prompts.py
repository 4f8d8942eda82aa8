"""Write small sets of everyday prompts, made from hand-written templates and word lists.

``OUT/prompts.jsonl`` gets 400 training prompts and ``OUT/heldout.jsonl`` 48 held-out ones, one
``{"prompt": "..."}`` per line. The held-out prompts come from their own templates and their own
topics, and the first three of them are fixed, so that they suit being shown to a person.

Usage: ``python make_prompts.py OUT [--seed 0]``
"""

from __future__ import annotations

import argparse
import itertools
import json
import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from string import Formatter

TRAIN_COUNT = 400
HELDOUT_COUNT = 48

# Each group: templates whose {slots} are filled from the group's own word lists.
Group = tuple[Sequence[str], Mapping[str, Sequence[str]]]

TRAIN: dict[str, Group] = {
    "cooking": (
        (
            "How do I cook {dish}?",
            "What goes well with {dish}?",
            "Give me a simple recipe for {dish}.",
            "My {dish} always turns out too dry. What can I change?",
        ),
        {
            "dish": (
                "fried rice",
                "lentil soup",
                "roast chicken",
                "banana bread",
                "mashed potatoes",
                "vegetable curry",
                "pancakes",
                "baked salmon",
                "an omelette",
            )
        },
    ),
    "home": (
        (
            "How can I clean {thing}?",
            "How often should I clean {thing}?",
            "What should I not use on {thing}?",
        ),
        {
            "thing": (
                "a wooden table",
                "the oven",
                "a wool sweater",
                "bathroom tiles",
                "a leather sofa",
                "the windows",
                "a dusty keyboard",
                "white sneakers",
            )
        },
    ),
    "garden": (
        (
            "When should I plant {plant}?",
            "How much water do {plant} need?",
            "Why do my {plant} have yellow leaves?",
            "Can I grow {plant} on a balcony?",
        ),
        {"plant": ("tomatoes", "roses", "strawberries", "carrots", "sunflowers", "herbs")},
    ),
    "pets": (
        (
            "What should I feed {animal}?",
            "How do I look after {animal}?",
            "Suggest five names for {animal}.",
            "How long does {animal} usually live?",
        ),
        {"animal": ("a kitten", "a puppy", "a goldfish", "a rabbit", "a parrot", "a hamster")},
    ),
    "explain": (
        (
            "Explain {idea} in two sentences.",
            "What is {idea}?",
            "Explain {idea} to a ten-year-old.",
            "Why does {idea} matter?",
        ),
        {
            "idea": (
                "gravity",
                "inflation",
                "photosynthesis",
                "a vaccine",
                "the internet",
                "recycling",
                "electricity",
                "democracy",
                "a budget",
                "evolution",
            )
        },
    ),
    "science": (
        (
            "Explain simply why {fact}.",
            "Tell me in one paragraph why {fact}.",
            "My son asks why {fact}. What do I tell him?",
        ),
        {
            "fact": (
                "leaves change color in autumn",
                "ice floats on water",
                "cats purr",
                "the moon changes its shape",
                "we need salt",
                "iron rusts",
                "birds fly south",
                "bread rises",
            )
        },
    ),
    "places": (
        (
            "What is {country} known for?",
            "Name three things to see in {country}.",
            "What do people eat in {country}?",
            "What is the weather like in {country} in spring?",
            "What should I pack for a week in {country}?",
        ),
        {
            "country": (
                "Japan",
                "Brazil",
                "Egypt",
                "Norway",
                "Mexico",
                "India",
                "Italy",
                "Kenya",
            )
        },
    ),
    "jobs": (
        (
            "What does {job} do all day?",
            "How do I become {job}?",
            "What skills does {job} need?",
            "Write one interview question for {job}.",
        ),
        {
            "job": (
                "a nurse",
                "a carpenter",
                "an accountant",
                "a pilot",
                "a librarian",
                "a chef",
                "a firefighter",
                "a web designer",
            )
        },
    ),
    "messages": (
        (
            "Write a short message to {person} to say thank you for {favor}.",
            "Write a polite note to {person} about {favor}.",
        ),
        {
            "person": ("my neighbor", "my teacher", "a colleague", "my aunt", "my landlord"),
            "favor": (
                "the birthday present",
                "help with moving boxes",
                "the ride to the airport",
                "the kind words last week",
            ),
        },
    ),
    "mail": (
        (
            "Write a two-line email to my boss: {matter}.",
            "Draft a friendly email that says {matter}.",
        ),
        {
            "matter": (
                "I will be late tomorrow",
                "the report is finished",
                "I need a day off on Friday",
                "the meeting moved to Monday",
                "the printer is broken again",
                "I would like to work from home this week",
            )
        },
    ),
    "stories": (
        (
            "Write the first sentence of a story about {hero}.",
            "Tell me a very short story about {hero}.",
            "Give me a title for a book about {hero}.",
            "Write a two-line poem about {hero}.",
        ),
        {
            "hero": (
                "a lost dog",
                "a brave mouse",
                "an old lighthouse",
                "a talking tree",
                "a clumsy wizard",
                "a snowy village",
                "two sisters on a train",
                "a robot who likes to paint",
            )
        },
    ),
    "words": (
        (
            "What does the word '{word}' mean?",
            "Use the word '{word}' in a sentence.",
            "Give me three other words for '{word}'.",
            "What is the opposite of '{word}'?",
        ),
        {"word": ("brave", "gentle", "stubborn", "ancient", "cheerful", "fragile", "curious")},
    ),
    "lists": (
        (
            "List four {items}.",
            "Name three {items} and say why you chose them.",
            "Which {items} would you suggest?",
        ),
        {
            "items": (
                "board games for families",
                "fruits rich in vitamin C",
                "indoor hobbies",
                "cheap weekend trips",
                "healthy snacks",
                "outdoor sports",
                "gifts for a grandmother",
                "questions to ask a new friend",
            )
        },
    ),
    "advice": (
        (
            "How can I {goal}?",
            "Give me two tips to help me {goal}.",
            "What is the first step if I want to {goal}?",
            "I find it hard to {goal}. Any ideas?",
        ),
        {
            "goal": (
                "save money each month",
                "drink more water",
                "learn Spanish",
                "run five kilometers",
                "read more books",
                "make new friends",
                "stop being late",
                "keep my desk tidy",
                "spend less time on my phone",
                "prepare for an exam",
            )
        },
    ),
    "compare": (
        (
            "What is the difference between {pair}?",
            "Which is better for a small family, {choice}?",
            "Help me decide: {choice}?",
        ),
        {
            "pair": (
                "a lake and a pond",
                "a frog and a toad",
                "jam and jelly",
                "weather and climate",
                "a novel and a short story",
                "a fruit and a vegetable",
            ),
            "choice": (
                "a bike or a car",
                "a house or a flat",
                "a cat or a dog",
                "the beach or the mountains",
                "a laptop or a tablet",
            ),
        },
    ),
    "history": (
        (
            "When was {invention} invented?",
            "How did {invention} change daily life?",
            "What did people do before {invention}?",
        ),
        {
            "invention": (
                "the telephone",
                "the printing press",
                "the steam engine",
                "the light bulb",
                "the bicycle",
                "paper money",
                "the camera",
            )
        },
    ),
    "numbers": (
        (
            "How many {unit}?",
            "I keep forgetting how many {unit}. Can you tell me?",
        ),
        {
            "unit": (
                "days are in a leap year",
                "minutes are in a day",
                "meters are in a mile",
                "grams are in a kilogram",
                "players are in a football team",
                "hours are in a week",
                "colors are in a rainbow",
            )
        },
    ),
    "computers": (
        (
            "What is {term} used for?",
            "Explain what {term} is without difficult words.",
            "How do I get started with {term}?",
            "Name one good and one bad thing about {term}.",
        ),
        {
            "term": (
                "a spreadsheet",
                "Python",
                "a password manager",
                "cloud storage",
                "a video call",
                "a search engine",
            )
        },
    ),
    "events": (
        (
            "Plan {event} for ten people.",
            "What do I need for {event}?",
            "Write an invitation to {event}.",
            "How can I make {event} more fun?",
        ),
        {
            "event": (
                "a picnic",
                "a birthday party",
                "a movie night",
                "a barbecue",
                "a school fair",
                "a farewell lunch",
            )
        },
    ),
}

# Shown to a person before and after training.
SHOWN = (
    "Why is the sky blue?",
    "How do I make a good cup of tea?",
    "Give me three tips for sleeping better.",
)

HELDOUT: dict[str, Group] = {
    "music": (
        (
            "Is it hard to play {instrument}?",
            "Describe the sound of {instrument}.",
            "What kinds of music use {instrument}?",
        ),
        {"instrument": ("the violin", "the drums", "the flute", "the guitar", "the piano")},
    ),
    "space": (
        (
            "Tell me an interesting fact about {body}.",
            "How far away is {body}?",
            "Could people ever live on {body}?",
        ),
        {"body": ("Mars", "the sun", "Saturn", "the nearest star")},
    ),
    "sea": (
        (
            "Where do {creature} live?",
            "What do {creature} eat?",
            "Are {creature} dangerous to people?",
        ),
        {"creature": ("whales", "jellyfish", "sharks", "octopuses", "sea turtles")},
    ),
    "materials": (
        (
            "How is {material} made?",
            "What was {material} first used for?",
        ),
        {"material": ("glass", "paper", "soap", "cement", "silk", "chocolate")},
    ),
    "feelings": (
        (
            "What can I say to a friend who {state}?",
            "My brother {state}. How can I support him?",
        ),
        {
            "state": (
                "lost a job",
                "feels lonely",
                "is nervous about a speech",
                "just broke up",
                "failed an exam",
            )
        },
    ),
    "repairs": (
        (
            "What tools do I need to fix {object}?",
            "Is it worth repairing {object}?",
        ),
        {"object": ("a flat tire", "a dripping tap", "a squeaky door", "a torn jacket")},
    ),
}


def fill(group: Group) -> list[str]:
    """Return every prompt of one group: each template with each choice of its slot words."""
    templates, words = group
    prompts = []
    for template in templates:
        slots = sorted({name for _, name, _, _ in Formatter().parse(template) if name})
        for choice in itertools.product(*(words[slot] for slot in slots)):
            prompts.append(template.format(**dict(zip(slots, choice, strict=True))))
    return prompts


def pick(groups: Mapping[str, Group], count: int, rng: random.Random) -> list[str]:
    """Draw ``count`` different prompts, taking turns among the groups, in shuffled order."""
    pools = [fill(group) for group in groups.values()]
    for pool in pools:
        rng.shuffle(pool)
    turns = [p for turn in itertools.zip_longest(*pools) for p in turn if p is not None]
    chosen = list(dict.fromkeys(turns))[:count]
    if len(chosen) < count:
        raise ValueError(f"the templates give only {len(chosen)} prompts, not {count}")
    rng.shuffle(chosen)
    return chosen


def write_jsonl(path: Path, prompts: Sequence[str]) -> None:
    """Write one ``{"prompt": ...}`` object per line."""
    lines = (json.dumps({"prompt": prompt}, ensure_ascii=False) for prompt in prompts)
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")


def main(argv: Sequence[str] | None = None) -> None:
    """Write both files and say how many prompts each holds."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path, help="folder that receives both files")
    parser.add_argument("--seed", type=int, default=0, help="seed of the draw (default: 0)")
    args = parser.parse_args(argv)

    rng = random.Random(args.seed)
    train = pick(TRAIN, TRAIN_COUNT, rng)
    heldout = [*SHOWN, *pick(HELDOUT, HELDOUT_COUNT - len(SHOWN), rng)]
    if set(train) & set(heldout):
        raise ValueError("a prompt is in both sets")

    args.out.mkdir(parents=True, exist_ok=True)
    for name, prompts in (("prompts.jsonl", train), ("heldout.jsonl", heldout)):
        write_jsonl(args.out / name, prompts)
        print(f"{args.out / name}: {len(prompts)} prompts")


if __name__ == "__main__":
    main()
