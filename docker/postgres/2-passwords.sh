#!/bin/sh
# Gives every user the password that the environment has for it: once when PostgreSQL's volume is
# new, and again to rotate passwords (docs/operations.md).
set -eu
psql --set ON_ERROR_STOP=1 --username "$POSTGRES_USER" --dbname postgres \
  --set user="$POSTGRES_USER" --set password="$POSTGRES_PASSWORD" \
  --set prefect="$PREFECT_DB_PASSWORD" --set mlflow="$MLFLOW_DB_PASSWORD" <<'SQL'
ALTER ROLE :"user" PASSWORD :'password';
ALTER ROLE prefect PASSWORD :'prefect';
ALTER ROLE mlflow PASSWORD :'mlflow';
SQL
