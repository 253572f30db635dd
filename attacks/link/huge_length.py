"""Announces a greeting of 8 EiB, hoping that it is allocated."""

from victim import attack_before_token, framed, knocking, wait_for_hang_up


def attack(path: str) -> None:
    with knocking(path) as connection:
        connection.sendall(framed(b"x", length=1 << 63))
        wait_for_hang_up(connection)


attack_before_token(attack)
