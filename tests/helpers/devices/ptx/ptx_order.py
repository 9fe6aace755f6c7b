"""In which order the pieces of a kernel run when threads have parted: every loop before what follows it.

The weak topological order of the flow graph (Bourdoncle, 1993): a strongly connected part is a loop, its
first piece stands before the others, which are ordered in the same way without the ways back to it. Lanes
that wait at the end of a branch or a loop are met there by those that took another way, wherever the
compiler has put the code.
"""


def flow_order(successors):
    """All pieces in order, piece 0 first and those that it does not lead to last; `successors` by piece."""
    reached, waiting = {0}, [0]
    while waiting:
        new = set(successors[waiting.pop()]) - reached
        reached |= new
        waiting += new
    order = list(_ordered(sorted(reached), successors))
    return order + [piece for piece in range(len(successors)) if piece not in reached]


def _ordered(nodes, successors):
    for part in _parts(nodes, successors):
        if len(part) == 1:
            yield part[0]
        else:
            first, *others = part
            yield first
            yield from _ordered(others, successors)


def _parts(nodes, successors):
    """Strongly connected parts in topological order, each from the node that is reached first (Tarjan)."""
    inside = set(nodes)
    index, low, stack, waiting, found = {}, {}, [], set(), []

    def visit(node):
        index[node] = low[node] = len(index)
        stack.append(node)
        waiting.add(node)
        for other in successors[node]:
            if other not in inside:
                continue
            if other not in index:
                visit(other)
                low[node] = min(low[node], low[other])
            elif other in waiting:
                low[node] = min(low[node], index[other])
        if low[node] == index[node]:
            part = stack[stack.index(node) :]
            del stack[stack.index(node) :]
            waiting.difference_update(part)
            found.append(part)

    for node in nodes:
        if node not in index:
            visit(node)
    return reversed(found)
