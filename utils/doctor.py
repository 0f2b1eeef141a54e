"""python -m utils.doctor [key=value ...]: checks a training run before it starts; see experiments/doctor.py.

Only starts that command: the check trains and evaluates a model, and nothing in utils imports what knows of models.
"""

import runpy

if __name__ == "__main__":
    runpy.run_module("experiments.doctor", run_name="__main__", alter_sys=True)
