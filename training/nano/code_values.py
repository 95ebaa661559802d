"""Values that programs read: paths, commands, expressions, lines of Python and SQL."""

from __future__ import annotations

from training.nano.examples import Source


def expression(s: Source) -> str:
    a, b, c = s.number(1, 999), s.number(1, 99), s.number(1, 20)
    return s.pick(f"{a} + {b}", f"{a} * {b}", f"{a} - {b}", f"{a} / {b}", f"({a} + {b}) * {c}", f"{a}*{b}", f"{a}+{b}-{c}", f"{a} % {b}", f"{b}^{c}")  # fmt: skip


def code_line(s: Source) -> str:
    a, b = s.number(), s.number()
    return s.pick(f"print({a} + {b})", f"len('{s.word()}')", f"{a} ** {b % 5}", f"print('{s.word()}')", f"sum([{a}, {b}])", f"x = {a}", f"max({a}, {b})")  # fmt: skip


def sql(s: Source) -> str:
    table, column = s.word(), s.word()
    return s.pick(f"SELECT * FROM {table}", f"SELECT {column} FROM {table}", f"SELECT {column} FROM {table} WHERE {s.word()} = {s.number()}",
                  f"SELECT COUNT(*) FROM {table}", f"DELETE FROM {table}", *_longer_sql(s, table, column))  # fmt: skip


def _longer_sql(s: Source, table: str, column: str) -> tuple[str, ...]:
    if not s.practice(0.6):
        return ()
    other, number = s.word(), s.number(0, 999)
    return (
        f"SELECT {column}, {other} FROM {table}", f"SELECT {column} FROM {table} WHERE {other} {s.pick('>', '<', '=', '>=')} {number}",
        f"SELECT * FROM {table} LIMIT {number}", f"UPDATE {table} SET {column} = {number}", f"SELECT * FROM {table} ORDER BY {column}",
        f"DELETE FROM {table} WHERE {column} = {number}",
    )  # fmt: skip


def path(s: Source) -> str:
    return s.pick(f"/home/{s.word()}", f"{s.word()}/{s.word()}", f"/{s.word()}", f"{s.word()}/{s.word()}.py", f"{s.word()}/{s.word()}.txt", s.word(), *_longer_paths(s))  # fmt: skip


def _longer_paths(s: Source) -> tuple[str, ...]:
    if not s.practice(0.6):
        return ()
    ending = s.pick(".yaml", ".json", ".md", ".toml", ".csv", ".log", ".html", ".js")
    return (
        f"{s.word()}/{s.word()}{ending}",
        f"/{s.word()}/{s.word()}{ending}",
        f"./{s.word()}{ending}",
        f"{s.word()}/{s.word()}/{s.word()}{ending}",
    )


def command(s: Source) -> str:
    return s.pick("ls", "pwd", f"ls {s.word()}", f"cat {s.word()}.txt", f"echo {s.word()}", f"rm {s.word()}.txt", "git status", f"mkdir {s.word()}")  # fmt: skip
