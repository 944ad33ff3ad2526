"""The version of siamtrack. `setup.py` reads it from here and refuses a `package.xml` that says otherwise."""

from __future__ import annotations

__version__ = "0.1.0"
