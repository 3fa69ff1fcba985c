#!/bin/sh
# A job by curl: handed in, waited for, read, its calls listed. `backstop up` says URL and keeps the key:
#   BACKSTOP_URL=http://127.0.0.1:8000 BACKSTOP_API_KEY=$(cat .backstop/api-key) sh examples/curl.sh
set -eu
: "${BACKSTOP_URL:?where the API is}" "${BACKSTOP_API_KEY:?a key}"

call() {
    curl --silent --show-error --fail-with-body --max-time 90 -H "Authorization: Bearer $BACKSTOP_API_KEY" -H "Content-Type: application/json" "$@"
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
# Or all in one: submit, and wait up to 30 s for the answer.
call -H "Prefer: wait=30" "$BACKSTOP_URL/v1/jobs" -d '{"messages": [{"role": "user", "content": "Hello"}]}'
echo
