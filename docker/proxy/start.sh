#!/bin/sh
# Write nginx's configuration from its template and the environment, make a certificate where none is given, and
# become nginx. Only /tmp and /certificates are written to.
#
#   UPSTREAM     host:port of the service           SERVER_NAME  public name, for the certificate that is made
#   RATE, BURST  requests of one address: per second, and at once above that
#   CONNECTIONS  requests of one address at a time  BODY         largest request
set -eu

certificate=/certificates/certificate.pem key=/certificates/key.pem
name=${SERVER_NAME:-localhost}
hsts=''
if [ ! -s "$certificate" ] || [ ! -s "$key" ]; then
  echo "no certificate.pem and key.pem in /certificates: making one for $name that no browser trusts" >&2
  umask 077
  openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -days 365 -sha256 \
    -subj "/CN=$name" -addext "subjectAltName=DNS:$name,DNS:localhost,IP:127.0.0.1" \
    -addext "extendedKeyUsage=serverAuth" -keyout "$key.new" -out "$certificate.new" 2>/dev/null
  mv "$key.new" "$key"
  mv "$certificate.new" "$certificate"
elif [ "$(openssl x509 -in "$certificate" -noout -issuer_hash)" != "$(openssl x509 -in "$certificate" -noout -subject_hash)" ]; then
  # Only with a certificate that somebody else vouches for: a browser that was told cannot go back to plain HTTP.
  hsts='add_header Strict-Transport-Security "max-age=31536000" always;'
fi

resolver=$(awk '$1 == "nameserver" { print ($2 ~ /:/) ? "[" $2 "]" : $2; exit }' /etc/resolv.conf)
sed -e "s|@UPSTREAM@|${UPSTREAM:-service:8000}|g" -e "s|@RESOLVER@|$resolver|g" -e "s|@HSTS@|$hsts|g" \
  -e "s|@RATE@|${RATE:-30}|g" -e "s|@BURST@|${BURST:-120}|g" \
  -e "s|@CONNECTIONS@|${CONNECTIONS:-100}|g" -e "s|@BODY@|${BODY:-16m}|g" \
  /etc/dml-proxy/nginx.conf.template > /tmp/nginx.conf
exec nginx -c /tmp/nginx.conf -g 'daemon off;'
