# shellcheck shell=bash
# Functions of the examples, which source this file.

# show_usage FILE... -- ARGUMENTS: prints the comments at the top of the files and exits if the arguments
# have --help or -h.
show_usage() {
    local files=() argument
    while [[ $1 != -- ]]; do
        files+=("$1")
        shift
    done
    for argument in "$@"; do
        if [[ $argument == --help || $argument == -h ]]; then
            local file
            for file in "${files[@]}"; do
                sed -nE '2,/^[^#]/s/^#( |$)//p' "$file"
            done
            exit 0
        fi
    done
}

# show_command COMMAND...: prints a command once per job, on the first node.
show_command() {
    if ((${SLURM_NODEID:-0} == 0)); then
        printf 'running:' >&2
        printf ' %q' "$@" >&2
        printf '\n' >&2
    fi
}
