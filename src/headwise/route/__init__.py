"""Route: which heads and experts each token uses, by one method a file. Results are `HeadRouter`."""

from headwise.registry import expose
from headwise.route._collect import HeadLoad
from headwise.route._config import LayerRoute, RouterConfig
from headwise.route._router import HeadRouter

__all__ = ["HeadLoad", "HeadRouter", "LayerRoute", "RouterConfig"]

expose(__name__)
