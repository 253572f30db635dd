"""Connects and says nothing, hoping that the rank waits for it instead of for its worker."""

from victim import attack_before_token, knocking, wait_for_hang_up


def attack(path: str) -> None:
    with knocking(path) as connection:
        wait_for_hang_up(connection)


attack_before_token(attack)
