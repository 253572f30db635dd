"""Greets without a token."""

from victim import attack_before_token, greeting, knocking, wait_for_hang_up


def attack(path: str) -> None:
    with knocking(path) as connection:
        connection.sendall(greeting(""))
        wait_for_hang_up(connection)


attack_before_token(attack)
