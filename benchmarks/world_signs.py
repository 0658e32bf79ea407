"""Signs to read: words, prices, numbers, and codes that are in no word list."""

from __future__ import annotations

import string

from mpa_edge.benchmarks.world_canvas import SIZE, Canvas, contrasting, size_for_advance
from mpa_edge.benchmarks.world_facts import Fact, Look

_WORDS = """
STOP EXIT OPEN SHOP CAFE TAXI BANK PARK HOTEL MUSIC BREAD MILK TEA COFFEE PIZZA SALE BOOKS TOYS GIFT FISH
FRUIT JUICE CAKE RICE SOUP SALAD MEAT EGGS WATER WINE BEER BAKERY MARKET CLOSED PUSH PULL SLOW YIELD ENTER
BUS TRAIN METRO FERRY AIR GAS OIL FIRE POLICE DANGER QUIET STAFF VISIT MUSEUM ZOO FARM BEACH RIVER LAKE
CITY NORTH SOUTH EAST WEST MAIN SCHOOL CLINIC DOCTOR GYM POOL SPA SALON BARBER SHOES HATS DRESS SHIRT
PHONE PHOTO PAINT TOOLS GARDEN ROSE TULIP LEMON APPLE PEAR PLUM GRAPE MELON ONION CORN BEAN HONEY SUGAR
SALT PEPPER PASTA GRILL BURGER TACO SUSHI KEBAB DELI FRESH HOT COLD NEW FREE BEST BIG LUCKY HAPPY HOUR
TICKET LIFT STAIRS
"""
WORDS = tuple(_WORDS.split())
"""Known words: all of three to six letters."""

CODE_CHARS = "ABCDEFGHJKLMNPRSTUVWXYZ23456789"
"""Characters of codes; those that look like others (0, 1, I, O, Q) are left out."""


def random_code(canvas: Canvas) -> str:
    """Three or four characters, with at least one digit, so that it is no word."""
    rng = canvas.rng
    chars = [rng.choice(CODE_CHARS) for _ in range(rng.choice((3, 3, 4)))]
    chars[rng.randrange(len(chars))] = rng.choice("23456789")
    return "".join(chars)


def random_price(canvas: Canvas) -> str:
    """From $0.25 to $29.99."""
    rng = canvas.rng
    dollars = rng.randint(0, 9) if rng.random() < 0.75 else rng.randint(10, 29)
    cents = rng.choice(("00", "25", "50", "75", "99", "95", f"{rng.randint(1, 99):02d}"))
    return f"${dollars}.{'50' if dollars == 0 and cents == '00' else cents}"


def draw_sign(canvas: Canvas, look: Look) -> list[Fact]:
    """A board with one or two lines of text, and all that can be asked about it."""
    rng = canvas.rng
    board = rng.choice([colour for colour in look.boards if colour != look.ground])
    ink = contrasting(rng, board)
    lines = _lines(canvas, look)
    font, advance = rng.choice(look.fonts), round(rng.uniform(*look.advances), 1)
    widest = max(len(text) for _, text in lines)
    size = size_for_advance(font, min(advance, round(84.0 / widest, 1)))
    while max(canvas.text_width(text, font, size) for _, text in lines) > SIZE - 8:
        size -= 1
    _draw_board(canvas, board, ink, lines, font, size)
    facts = [Fact(f"read_{kind}", text) for kind, text in lines]
    return [*facts, Fact("sign_color", board), Fact("text_color", ink)]


def _lines(canvas: Canvas, look: Look) -> list[tuple[str, str]]:
    """The texts of a sign with their kinds, top to bottom."""
    rng = canvas.rng
    first = rng.choices(("word", "code", "number", "price"), (45, 25, 15, 15))[0]
    lines = [(first, _content(canvas, look, first))]
    if first == "word" and rng.random() < 0.5:
        second = rng.choice(("price", "number", "price"))
        lines.append((second, _content(canvas, look, second)))
    return lines


def _content(canvas: Canvas, look: Look, kind: str) -> str:
    """A random text of one kind."""
    if kind == "word":
        if look.spelled and canvas.rng.random() < look.spelled:
            return "".join(canvas.rng.choice(string.ascii_uppercase) for _ in range(canvas.rng.randint(3, 6)))
        return canvas.rng.choice(look.words)
    if kind == "code":
        return random_code(canvas)
    if kind == "number":
        return str(canvas.rng.randint(10, 10 ** canvas.rng.randint(2, 4) - 1))
    return random_price(canvas)


def _draw_board(canvas: Canvas, board: str, ink: str, lines: list[tuple[str, str]], font: str, size: int) -> None:
    """The board somewhere on the canvas, its border, and the lines centred on it."""
    rng = canvas.rng
    wide = max(canvas.text_width(text, font, size) for _, text in lines)
    step = 0.75 * size + rng.randint(5, 9)
    width, height = min(SIZE - 2, wide + rng.randint(8, 18)), step * len(lines) + rng.randint(6, 14)
    left, top = rng.uniform(1, SIZE - 1 - width), rng.uniform(1, SIZE - 1 - height)
    box = (left, top, left + width, top + height)
    radius = rng.choice((0, 0, 4, 9))
    outline = canvas.shade(rng.choice((ink, "black", "white"))) if rng.random() < 0.4 else None
    canvas.pen.rounded_rectangle(box, radius, fill=canvas.shade(board), outline=outline, width=2 if outline else 0)
    canvas.mark(box, board, "sign")
    y = top + (height - step * len(lines) + step - 0.73 * size) / 2
    for _, text in lines:
        canvas.text(left + (width - canvas.text_width(text, font, size)) / 2, y, text, font, size, ink)
        y += step
