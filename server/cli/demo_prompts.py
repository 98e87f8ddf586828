"""The demo's questions, with the answer that its one judge would like: one short sentence.

`JUDGED` are asked, judged and corrected; `HELD_OUT` are asked before and after and never judged.
"""

from __future__ import annotations

from typing import Final

JUDGED: Final[tuple[tuple[str, str], ...]] = (
    ("What is a glacier?", "A glacier is a thick mass of ice that slowly flows over land."),
    (
        "Why do leaves change colour in autumn?",
        "Leaves lose their green chlorophyll, so the yellow and red pigments show.",
    ),
    (
        "How does a bicycle stay upright?",
        "A moving bicycle stays upright because steering keeps its wheels under its weight.",
    ),
    (
        "What does a thermostat do?",
        "A thermostat keeps a room at a set temperature by switching heating on and off.",
    ),
    (
        "Explain what an API is.",
        "An API is a set of rules by which one program asks another for something.",
    ),
    (
        "What is the difference between weather and climate?",
        "Weather is what happens today, and climate is what happens over many years.",
    ),
    (
        "How do I boil an egg?",
        "Put the egg in boiling water for eight minutes and cool it in cold water.",
    ),
    (
        "Why is the sea salty?",
        "Rivers carry dissolved minerals to the sea, where water evaporates and salt stays.",
    ),
    ("What is a desert?", "A desert is a region where hardly any rain falls."),
    (
        "Give me a tip for sleeping better.",
        "Go to bed at the same time every night and keep the room dark.",
    ),
    (
        "What is photosynthesis?",
        "Photosynthesis is how plants turn light, water and carbon dioxide into sugar.",
    ),
    (
        "How can I learn a new language faster?",
        "Practise speaking a little every day with people who know the language.",
    ),
    ("What causes thunder?", "Lightning heats the air so quickly that it expands with a bang."),
    (
        "Who was Marie Curie?",
        "Marie Curie was a physicist and chemist who discovered radium and polonium.",
    ),
    (
        "What is a prime number?",
        "A prime number is a whole number above one that only one and itself divide.",
    ),
    (
        "How do vaccines work?",
        "Vaccines show the immune system a harmless part of a germ so that it learns to fight it.",
    ),
    (
        "Why do cats purr?",
        "Cats purr mostly when they are content, and sometimes to calm themselves.",
    ),
    (
        "What should I pack for a day of hiking?",
        "Pack water, food, a map, a warm layer and a small first aid kit.",
    ),
    (
        "Summarise the story of Cinderella.",
        "A mistreated girl goes to a ball by magic and marries the prince who finds her shoe.",
    ),
    (
        "What is a database index?",
        "A database index is a sorted structure that finds rows without reading the whole table.",
    ),
    ("Translate into French: The train leaves at noon.", "Le train part à midi."),
    ("What is 15 percent of 80?", "Fifteen percent of 80 is 12."),
    (
        "Why do we have leap years?",
        "A year is a quarter of a day longer than 365 days, so every fourth year has a day more.",
    ),
    (
        "How do I remove a coffee stain from a shirt?",
        "Rinse the stain with cold water and rub it with a little washing-up liquid.",
    ),
    ("What is gravity?", "Gravity is the force with which masses attract each other."),
    (
        "What does a compiler do?",
        "A compiler translates source code into instructions that a machine can run.",
    ),
    (
        "How do bees make honey?",
        "Bees collect nectar and fan the water out of it until it becomes honey.",
    ),
    (
        "What is a good way to start a speech?",
        "Start with a short story that leads straight to your point.",
    ),
    ("Why is exercise important?", "Exercise keeps the heart, the muscles and the mind healthy."),
    (
        "Explain what a loop is in programming.",
        "A loop repeats the same instructions until a condition ends it.",
    ),
    ("Translate into German: Good morning, my friend.", "Guten Morgen, mein Freund."),
    (
        "What is the water cycle?",
        "Water evaporates, forms clouds, falls as rain and flows back to the sea.",
    ),
    (
        "How does a refrigerator work?",
        "A refrigerator pumps heat from its inside to the outside with an evaporating fluid.",
    ),
    (
        "Name the planets of the solar system.",
        "They are Mercury, Venus, Earth, Mars, Jupiter, Saturn, Uranus and Neptune.",
    ),
    ("What is a metaphor?", "A metaphor describes one thing by calling it another."),
    (
        "How can I save money on groceries?",
        "Plan your meals for the week and buy only what is on the list.",
    ),
    ("Why do onions make you cry?", "Cut onions release a gas that stings the eyes."),
    (
        "If a shirt costs 20 dollars and is reduced by a quarter, what does it cost?",
        "The shirt costs 15 dollars.",
    ),
    (
        "What is machine learning?",
        "Machine learning is when a program finds rules in data instead of being told them.",
    ),
    (
        "How do I politely decline an invitation?",
        "Say thank you, say that you can't come, and wish them a good time.",
    ),
    (
        "What is the capital of Japan, and what is it known for?",
        "Tokyo is the capital of Japan and is known for its size, food and trains.",
    ),
    (
        "How are mountains formed?",
        "Mountains rise where plates of the Earth's crust push against each other.",
    ),
    ("What does a lawyer do?", "A lawyer advises people on the law and speaks for them in court."),
    (
        "Summarise: Regular breaks help people stay focused and make fewer mistakes at work.",
        "Regular breaks keep people focused and reduce mistakes.",
    ),
    (
        "What should I do when my phone gets wet?",
        "Switch it off at once and let it dry for a day or two.",
    ),
    ("Why is the sky blue?", "Air scatters blue light more than red light, so the sky looks blue."),
    ("What does HTTP stand for?", "HTTP stands for Hypertext Transfer Protocol."),
    ("How do I write a good headline?", "Say in a few strong words what the reader gains."),
    (
        "What is democracy?",
        "Democracy is a form of government in which the people choose those who rule.",
    ),
    ("How do I water house plants?", "Water them when the top of the soil feels dry."),
    ("What is a cloud made of?", "A cloud is made of tiny drops of water or crystals of ice."),
    (
        "Write a Python expression that reverses the string s.",
        "The expression s[::-1] reverses the string.",
    ),
)

HELD_OUT: Final[tuple[str, ...]] = (
    "What is a volcano?",
    "How do I make a cup of tea?",
    "Why do birds migrate?",
    "What is the difference between a virus and a bacterium?",
    "Explain what an operating system does.",
    "What is a haiku?",
    "How do aeroplanes fly?",
    "What causes the seasons?",
    "How can I concentrate better while studying?",
    "What is a black hole?",
    "Who was Leonardo da Vinci?",
    "What is the purpose of a contract?",
    "How does a microwave oven heat food?",
    "Why do we dream?",
    "What is a variable in programming?",
    "How do I tie a tie?",
)
