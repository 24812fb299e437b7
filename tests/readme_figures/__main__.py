"""`python -m tests.readme_figures`: write or check the figures of README.md and docs/benchmarks.md."""

import sys

from tests.readme_figures.figures import main

sys.exit(main())
