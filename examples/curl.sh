#!/bin/sh
# A job by curl: handed in, waited for, read, its calls listed; then a batch. `backstop up` says URL and keeps the key:
#   BACKSTOP_URL=http://127.0.0.1:8000 BACKSTOP_API_KEY=$(cat .backstop/api-key) sh examples/curl.sh
set -eu
: "${BACKSTOP_URL:?where the API is}" "${BACKSTOP_API_KEY:?a key}"

call() {
    curl --silent --show-error --fail-with-body --max-time 90 -H "Authorization: Bearer $BACKSTOP_API_KEY" -H "Content-Type: application/json" "$@"
}

id_of() {
    sed -n 's/.*"id": *"\([^"]*\)".*/\1/p'
}

# Submit; Location says where it is. The same Idempotency-Key again is the same job.
key="example-$$-$(date +%s)"
job=$(call -o /dev/null -D - -H "Idempotency-Key: $key" "$BACKSTOP_URL/v1/jobs" \
    -d '{"messages": [{"role": "user", "content": "Hello"}], "max_tokens": 50}' | tr -d '\r' | sed -n 's/^[Ll]ocation: //p')
case $job in http*) ;; *) job=$BACKSTOP_URL$job ;; esac

call "$job?wait=30" # long poll: returns as soon as it has ended
echo
call "$job/calls"
echo
# Server-sent events: each state it is in, the last with the whole job. -H "Last-Event-ID: ..." goes on after the one seen last.
call --no-buffer "$job/events"
# Or all in one: submit, and wait up to 30 s for the answer.
call -H "Prefer: wait=30" "$BACKSTOP_URL/v1/jobs" -d '{"messages": [{"role": "user", "content": "Hello"}]}'
echo

# A batch: a file of requests, a line each. Its results are a line for each job.
line='{"custom_id": "t-%s", "method": "POST", "url": "/v1/chat/completions", "body": {"messages": [{"role": "user", "content": "No. %s"}]}}\n'
file=$(for n in 1 2 3; do
    printf "$line" "$n" "$n"
done | curl --silent --show-error --fail-with-body --max-time 90 -H "Authorization: Bearer $BACKSTOP_API_KEY" \
    -F purpose=batch -F "file=@-;filename=tickets.jsonl" "$BACKSTOP_URL/v1/files" | id_of)
batch=$(call "$BACKSTOP_URL/v1/batches" \
    -d '{"input_file_id": "'"$file"'", "endpoint": "/v1/chat/completions", "completion_window": "24h"}' | id_of)
# NDJSON that comes as the jobs end; ?cursor= with that of the last whole line goes on where it was cut off.
call --no-buffer "$BACKSTOP_URL/v1/batches/$batch/results"
