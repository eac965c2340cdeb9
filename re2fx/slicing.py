from dataclasses import dataclass
from torch.fx import Node, Graph
@dataclass(frozen=True)
class Region:
    nodes: tuple[Node, ...]
    sliced: dict[Node, tuple[int,int]]
    whole: tuple[Node, ...]
    outputs: dict[Node, tuple[int,int]]
    items: int
    quiet: tuple[str, ...]
    bytes: int
    def graph(self) -> Graph: ...
def regions(graph, root, values, least=2): return []
