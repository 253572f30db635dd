"""Guesses tokens: hundreds of them, as fast as it can."""

from victim import attack_before_token, greeting, knocking, wait_for_hang_up


def attack(path: str) -> None:
    for guess in range(300):
        with knocking(path) as connection:
            connection.sendall(greeting(f"{guess:043}"))
            wait_for_hang_up(connection)


attack_before_token(attack)
