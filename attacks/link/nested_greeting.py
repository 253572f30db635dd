"""A greeting with a field of three thousand nested lists, hoping that the decoder's stack runs over."""

from victim import attack_before_token, framed, knocking, wait_for_hang_up


def attack(path: str) -> None:
    with knocking(path) as connection:
        connection.sendall(framed(b"\x82\xa4type\xa5Hello\xa1x" + b"\x91" * 3000))
        wait_for_hang_up(connection)


attack_before_token(attack)
