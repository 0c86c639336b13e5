# Copyright (c) 2026, the iommufd.host authors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

# The developer's interface. Needs GNU make and Python >= 3.11 with venv (Debian: apt-get install make python3-venv);
# everything else is installed into a cache outside the checkout, keyed by what went into it.

SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help

CACHE ?= $(or $(IOMMUFD_HOST_CACHE),$(or $(XDG_CACHE_HOME),$(HOME)/.cache)/iommufd-host)
PYTHON ?= python3
KEY := $(shell { $(PYTHON) -VV; cat tests/requirements/test.txt; } 2>/dev/null | sha256sum | cut -c1-12)
VENV := $(CACHE)/venv-$(KEY)
COLLECTIONS := $(CURDIR)/build/collections

export ANSIBLE_COLLECTIONS_PATH := $(COLLECTIONS)
export IOMMUFD_HOST_CACHE := $(CACHE)
export ANSIBLE_CONFIG := $(CURDIR)/ansible.cfg
export ANSIBLE_LOCAL_TEMP := $(CURDIR)/build/ansible-tmp
export ANSIBLE_HOME := $(CURDIR)/build/ansible-home
export PATH := $(VENV)/bin:$(PATH)
export PYTHONUNBUFFERED := 1

.PHONY: help
help: ## This list
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /\1\t/' | expand -t 16

# -- For users --------------------------------------------------------------------------------------------------------

.PHONY: demo
demo: ready ## Build a lab host, provision it, verify a guest on it; results in build/demo
	@tests/tools/demo

.PHONY: lab
lab: ready ## Start the lab hosts of INVENTORY (default examples/lab/hosts.yml)
	@ansible-playbook -i $(or $(INVENTORY),examples/lab/hosts.yml) iommufd.host.lab

.PHONY: lab-list
lab-list: ready ## List the lab hosts of INVENTORY
	@ansible-playbook -i $(or $(INVENTORY),examples/lab/hosts.yml) iommufd.host.lab -e lab_state=listed

.PHONY: lab-destroy
lab-destroy: ready ## Destroy the lab hosts of INVENTORY
	@ansible-playbook -i $(or $(INVENTORY),examples/lab/hosts.yml) iommufd.host.lab -e lab_state=absent

# -- For developers ---------------------------------------------------------------------------------------------------

.PHONY: test
test: peers test-fast docs sanity importer tarball page molecule ## All tests, as CI runs them

.PHONY: test-fast
test-fast: lint typing unit ## What needs no virtual machine

.PHONY: peers
peers: ## What unit tests compare with or run, where it is there: libvirt's and Augeas' own parsers, tools
	@tests/tools/packages busybox-static cpio fdisk iproute2 libaugeas0 libvirt0 pciutils shellcheck xz-utils zstd

.PHONY: unit
unit: ready ## Unit tests
	@python -m pytest -q -n 2 --basetemp=build/pytest tests/unit

.PHONY: test-one
test-one: ready ## One test file, directory or name (TEST=...), in seconds
	@python -m pytest -q --basetemp=build/pytest-one $(TEST)

.PHONY: typing
typing: ready ## Type checks
	@mypy --cache-dir build/mypy --config-file pyproject.toml \
	  $$(cd build/collections && find -L ansible_collections/iommufd/host/plugins -name '*.py' -printf 'build/collections/%p ')

.PHONY: lint
lint: lint-code ## Style, spelling, YAML, Ansible, documentation, changelog and licence checks
	@codespell
	@yamllint --strict .
	@tests/tools/in-copy \
	  'ansible-lint --offline --strict' \
	  'antsibull-changelog lint' \
	  'antsibull-docs lint-collection-docs --plugin-docs --validate-collection-refs all .'
	@reuse lint --quiet || { reuse lint; exit 1; }

.PHONY: docs
docs: ready ## The documentation site in build/docs/html; a warning is an error
	@tests/tools/docs

.PHONY: lint-code
lint-code: ready ## Style of the Python code
	@ruff check .
	@ruff format --check .

.PHONY: format
format: ready ## Format the Python code
	@ruff check --fix-only --quiet . && ruff format .

.PHONY: sanity
sanity: ready ## ansible-test sanity
	@tests/tools/sanity

.PHONY: importer
importer: ready ## Build the collection and let the Galaxy importer judge it
	@tests/tools/importer

.PHONY: tarball
tarball: ready ## Build the collection, install it away from the checkout, and run it there
	@tests/tools/tarball

.PHONY: page
page: docs ## The audit playbook, its page and the documentation in Chromium; figures in build/page.json
	@tests/tools/packages chromium fonts-dejavu-core
	@python -m pytest -q --basetemp=build/pytest-page tests/page

.PHONY: screenshots
screenshots: ready ## The pictures in docs/images, made anew
	@tests/tools/packages chromium fonts-dejavu-core fonts-inter fonts-jetbrains-mono
	@python tests/page/screenshots.py docs/images

.PHONY: molecule
molecule: ready ## The scenario on a lab host: converge, idempotence, reboot, verify, undo
	@tests/tools/molecule test --scenario-name default

.PHONY: proof
proof: $(patsubst tests/proof/%,proof-%,$(wildcard tests/proof/[a-z]*)) ## Long runs that CI does not carry; results in build/proof

# One run: make proof-NAME, for each executable tests/proof/NAME. Its output and verdict stay in build/proof/NAME/.
proof-%: ready
	@mkdir -p build/proof/$* && tests/proof/$* build/proof/$* 2>&1 | tee build/proof/$*/output.txt

.PHONY: bench
bench: ready ## Benchmarks (ONLY="NAME ..." for some); results in build/bench.json, growth in build/bench.svg
	@python tests/bench/bench.py $(ONLY)

.PHONY: changelog
changelog: ready ## Release the changelog fragments as VERSION
	@tests/tools/in-copy 'antsibull-changelog release --version $(VERSION)'
	@cp build/copy/ansible_collections/iommufd/host/CHANGELOG.rst . && \
	  cp build/copy/ansible_collections/iommufd/host/changelogs/changelog.yaml changelogs/ && rm -f changelogs/fragments/*.yml

.PHONY: clean
clean: ## Remove build/ (the cache stays; it is $(CACHE))
	@rm -rf build tests/output

# -- What the targets stand on ----------------------------------------------------------------------------------------

.PHONY: ready
ready: $(VENV)/.complete $(COLLECTIONS)/ansible_collections/iommufd/host
	@mkdir -p build/ansible-tmp build/ansible-home

$(VENV)/.complete:
	@tests/tools/make-venv "$(PYTHON)" "$(VENV)" tests/requirements/test.txt

# Ansible finds a collection by its place in the tree, so the checkout gets such a place.
$(COLLECTIONS)/ansible_collections/iommufd/host:
	@mkdir -p $(@D) && ln -sfn ../../../.. $@
