#!/bin/sh
# Runs once, when PostgreSQL's volume is new: a user and a database for each server, and neither
# may look into the other's.
set -eu
psql --set ON_ERROR_STOP=1 --username "$POSTGRES_USER" --dbname postgres <<'SQL'
CREATE ROLE prefect LOGIN;
CREATE ROLE mlflow LOGIN;
CREATE DATABASE prefect OWNER prefect;
CREATE DATABASE mlflow OWNER mlflow;
REVOKE CONNECT ON DATABASE prefect, mlflow FROM PUBLIC;
SQL
