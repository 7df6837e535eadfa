#!/bin/sh
# Does NEW compute the same numbers as OLD? Run in the repository:
#
#     scripts/same_numbers.sh OLD NEW [RETIRED.csv ...]
#     PYTHON=.venv/bin/python scripts/same_numbers.sh HEAD~1 HEAD
#
# OLD and NEW are git revisions. Each is checked out into a temporary worktree, which runs the smoke
# profile with a cache of its own, from nothing, by an environment of its own (`make .venv/installed`)
# or by PYTHON, which then serves both. Every csv of OLD must be in NEW, the same to the byte, except
# those that are named RETIRED (a file's name, or notebook/name). Names each that differs or is
# missing. Exit status: 0 if there is none, 1 if there is one, 2 if a profile did not run.
# About 15 minutes on two cores, and as many again without PYTHON.
set -u
[ $# -ge 2 ] || { sed -n '2,12s/^# \{0,1\}//p' "$0"; exit 2; }
old=$1 new=$2; shift 2; retired=" $* "
if [ -n "${PYTHON:-}" ]; then PYTHON=$(cd "$(dirname "$PYTHON")" && pwd)/$(basename "$PYTHON"); fi
cd "$(git rev-parse --show-toplevel)" || exit 2
work=$(mktemp -d) || exit 2
remove() {
    for tree in old new; do git worktree remove --force "$work/$tree" 2>/dev/null; done
    rm -rf "$work"; git worktree prune
}
trap remove EXIT; trap 'exit 2' INT TERM HUP

run() {  # run REVISION TREE
    git worktree add --quiet --detach "$work/$2" "$1" || exit 2
    cd "$work/$2" || exit 2
    [ -n "${PYTHON:-}" ] || make .venv/installed >"$work/$2.log" 2>&1 || { tail "$work/$2.log"; exit 2; }
    PYTHONPATH=$PWD DTLIB_CACHE=$work/$2-cache "${PYTHON:-.venv/bin/python}" -m dtlib figures \
        --profile smoke >"$work/$2.log" 2>&1 || { tail "$work/$2.log"; exit 2; }
}
for side in "$old old" "$new new"; do
    echo "smoke profile of ${side% *}"
    (run ${side% *} "${side#* }") || exit 2
done

status=0 same=0
for table in $(cd "$work/old/figures/smoke" && find . -name '*.csv' | sed 's|^\./||' | sort); do
    case "$retired" in *" $table "* | *" ${table##*/} "*) continue ;; esac
    theirs=$work/new/figures/smoke/$table
    if [ ! -f "$theirs" ]; then echo "missing: $table"; status=1
    elif cmp "$work/old/figures/smoke/$table" "$theirs"; then same=$((same + 1)); else status=1; fi
done
echo "$same tables are the same"; [ $same -gt 0 ] || status=1
exit $status
