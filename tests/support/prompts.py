"""Sixteen prompts of many kinds: short, long, Chinese, emoji, code."""

_PARAGRAPH = ("The harbour master wrote down every ship that came in, its cargo, its captain and the "
              "weather of the day, and at the end of each month he counted what had changed. ")

PROMPTS = [
    "Hello",
    "The capital of France is",
    "Once upon a time",
    "1, 2, 3, 4,",
    "What is 17 times 23?",
    "def fibonacci(n):\n    ",
    "#include <stdio.h>\n\nint main(void) {\n",
    "SELECT name, age FROM people WHERE",
    "中国的首都是",
    "请用一句话介绍机器学习。",
    "I love 🍕 and 🎉 because",
    "👩‍👩‍👧‍👦 is a family of",
    "Translate to French: good morning, my friend.",
    "A list of colours:\n- red\n- green\n- ",
    "  leading spaces and\ttabs\n\n",
    _PARAGRAPH * 45 + "\nIn short,",  # about 1,500 tokens
]
