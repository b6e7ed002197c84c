"""`python -m disback` is `disback`."""

import sys

from .launch import main

sys.exit(main())
