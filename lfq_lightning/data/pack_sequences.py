"""Pack short sequences into windows, so that few tokens are pads."""


def pack_sequences(sequences: list[list[int]], seq_len: int) -> list[list[int]]:
    """Return windows of at most `seq_len` tokens, each some whole sequences one after the other, in order.

    A sequence goes into the first window with room for it. One that follows another sees it: attention is causal
    over the whole window, as in the packed training that most models come from.
    """
    windows: list[list[int]] = []
    room: list[int] = []
    for sequence in sequences:
        place = next((i for i, free in enumerate(room) if free >= len(sequence)), None)
        if place is None:
            windows.append([])
            room.append(seq_len)
            place = len(windows) - 1
        windows[place] += sequence
        room[place] -= len(sequence)
    return windows
