"""What s3_media_upload of synapse-s3-storage-provider 1.7.0 makes."""

from __future__ import annotations

OLD_SCHEMA = """
    CREATE TABLE IF NOT EXISTS media (
        origin TEXT NOT NULL, media_id TEXT NOT NULL, filesystem_id TEXT NOT NULL, type TEXT NOT NULL,
        known_deleted BOOLEAN NOT NULL
    );
    CREATE UNIQUE INDEX IF NOT EXISTS media_id_idx ON media(origin, media_id);
    CREATE INDEX IF NOT EXISTS deleted_idx ON media(known_deleted);
"""
