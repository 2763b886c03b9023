"""Personal data made up by a seed, in the formats that people write: to be planted in queries."""

import ipaddress
import random
import string

FIRST = (
    "Anna",
    "José",
    "Zoë",
    "Siobhán",
    "Jean-Luc",
    "Åsa",
    "伟",
    "O'Brien",
    "Mary Ann",
    "Дмитрий",
)
LAST = ("Schmidt", "O'Neill", "de la Cruz", "Müller", "Nguyễn", "Łukasik", "Okafor", "Петров")
# Country: letters of the bank, digits after them.
IBANS = {"DE": (0, 18), "GB": (4, 14), "NL": (4, 10), "FR": (0, 23), "NO": (0, 11), "MT": (4, 23)}
PREFIXES = (("4", 16), ("4", 13), ("51", 16), ("2221", 16), ("34", 15), ("3528", 16), ("6011", 16),
            ("36", 14), ("62", 19), ("2200", 16))  # fmt: skip
PHONES = (  # a digit for each 9, which is never a 0
    "+49 199 9999999", "+4919999999", "+49 (0)199 9999999", "0049 199 9999999", "+1 (299) 299-9999",
    "+1-299-299-9999", "+1.299.299.9999", "+44 20 9999 9999", "+33 1 99 99 99 99",
    "+91-99999-99999", "(299) 299-9999", "299-299-9999", "299.299.9999", "299 299 9999",
    "0199 9999999", "(030) 999999", "030/9999999", "01 99 99 99 99", "020 9999 9999",
    "0199-9999999", "01999999999", "1-299-299-9999", "+86 139 9999 9999", "+47 99 99 99 99",
)  # fmt: skip


def name(draw: random.Random) -> str:
    return f"{draw.choice(FIRST)} {draw.choice(LAST)}{draw.choice(('', '', ' Jr', '-Weiß'))}"


def email(draw: random.Random) -> str:
    word = lambda n: "".join(draw.choices(string.ascii_lowercase, k=n))  # noqa: E731
    local = draw.choice(("{}.{}", "{}+{}", "{}_{}", "o'{}{}", "{}-{}%x", "ünï{}{}", "{}/dept={}"))
    host = draw.choice(("{}.org", "mail.{}.co.uk", "{}-x.museum", "müller-{}.de", "{}.xn--p1ai"))
    mail = local.format(word(4), word(5)) + "@" + host.format(word(6))
    return mail.upper() if draw.random() < 0.2 else mail


def iban(draw: random.Random) -> str:
    country = draw.choice(list(IBANS))
    letters, digits = IBANS[country]
    bank = "".join(draw.choices(string.ascii_uppercase, k=letters))
    bank += "".join(draw.choices(string.digits, k=digits))
    number = int("".join(str(int(c, 36)) for c in f"{bank}{country}00"))
    whole = f"{country}{98 - number % 97:02}{bank}"
    groups = [whole[i : i + 4] for i in range(0, len(whole), 4)]
    return draw.choice((whole, " ".join(groups), "-".join(groups), whole.lower()))


def card(draw: random.Random) -> str:
    prefix, length = draw.choice(PREFIXES)
    digits = prefix + "".join(draw.choices(string.digits, k=length - len(prefix) - 1))
    doubled = [int(d) * (2 - i % 2) for i, d in enumerate(digits[::-1])]
    digits += str(-sum(d // 10 + d % 10 for d in doubled) % 10)
    sizes = (4, 6, 5) if length == 15 else (4,) * (length // 4) + (length % 4,)
    sizes = (4, 6, 4) if length == 14 else sizes
    at = [sum(sizes[:i]) for i in range(len(sizes))]
    groups = [digits[i : i + size] for i, size in zip(at, sizes, strict=True) if size]
    grouped = draw.choice((" ", "-")).join(groups)
    return grouped if draw.random() < 0.6 and len(groups[-1]) > 2 else digits


def phone(draw: random.Random) -> str:
    form = draw.choice(PHONES)
    return "".join(draw.choice("23456789") if c == "9" else c for c in form)


def ip(draw: random.Random) -> str:
    v6 = ipaddress.IPv6Address(draw.getrandbits(112) | 0x2A01 << 112)
    short = ipaddress.IPv6Address(0x20010DB8 << 96 | draw.getrandbits(16) + 1)
    v4 = ".".join(str(draw.randrange(1, 256)) for _ in range(4))
    return draw.choice((v4, v4, str(v6), v6.exploded.upper(), str(short), f"::ffff:{v4}"))


KINDS = {"EMAIL": email, "IBAN": iban, "CARD": card, "PHONE": phone, "IP": ip, "NAME": name}
AROUND = (
    ("Write to ", " please."), ("(", ")"), ("", ", and"), ("it is: ", "."), ("“", "”"),
    ("\n", "\n"), ("7 apples; ", "; 3 pears"), ("<b>", "</b>"), ("|", "|"), ("a=", "&"),
    ("**", "**"),
)  # fmt: skip


def sentences(count: int, seed: int) -> list[tuple[str, str, str]]:
    """(text, personal data in it, kind): `count` of each kind."""
    draw = random.Random(seed)
    rows = []
    for kind, make in KINDS.items():
        for _ in range(count):
            value, (before, after) = make(draw), draw.choice(AROUND)
            rows.append((f"{before}{value}{after}", value, kind))
    draw.shuffle(rows)
    return rows


def squeezed(text: str) -> str:
    """A text without what formats of one number differ in."""
    return "".join(c for c in text.casefold() if c.isalnum())


def leaked(values: list[str], sent: str) -> list[str]:
    """Those of `values` that `sent` holds, in this or another format."""
    bare = squeezed(sent)
    return [v for v in values if v in sent or (len(squeezed(v)) > 8 and squeezed(v) in bare)]
