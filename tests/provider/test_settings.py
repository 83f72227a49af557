"""The `config` block: what it may hold, what it comes to, and what is said of mistakes."""

from __future__ import annotations

from typing import Any

import pytest

from backends.errors import SettingsError
from storage_provider.settings import LocalCacheSettings, ProviderSettings, parse_duration

MINUTE, HOUR, DAY = 60, 3600, 86_400


def parse(**values: Any) -> ProviderSettings:
    return ProviderSettings.parse({"bucket": "media", **values})


def refusal(**values: Any) -> SettingsError:
    with pytest.raises(SettingsError) as caught:
        parse(**values)
    return caught.value


def cache(**values: Any) -> LocalCacheSettings:
    settings = parse(local_cache=values).local_cache
    assert settings is not None
    return settings


def test_a_bucket_is_enough_and_the_rest_has_the_documented_defaults() -> None:
    settings = parse()
    assert settings.threadpool_size == 20
    assert settings.check_on_startup == "warn"
    assert settings.auto_restore is True
    assert settings.auto_restore_startup is True
    assert settings.auto_restore_monitor_interval == 300
    assert settings.auto_restore_batch_size == 50
    assert settings.delete_from_bucket is True
    assert settings.local_cache is None
    assert settings.misplaced == ()


@pytest.mark.parametrize("values", [None, [], "bucket", 1])
def test_what_is_no_mapping_is_refused(values: Any) -> None:
    with pytest.raises(SettingsError, match="must be a mapping"):
        ProviderSettings.parse(values)


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        (90, 90),
        ("90", 90),
        ("90s", 90),
        ("10m", 10 * MINUTE),
        ("12h", 12 * HOUR),
        ("7d", 7 * DAY),
        ("2w", 14 * DAY),
        ("1y", 365 * DAY),
        (" 7 d ", 7 * DAY),
        (300.5, 301),
        (0.5, 1),
    ],
)
def test_a_duration_is_written_as_synapse_writes_it(text: Any, seconds: int) -> None:
    assert parse_duration(text) == seconds
    assert parse(auto_restore_monitor_interval=text).auto_restore_monitor_interval == seconds


@pytest.mark.parametrize(
    "text", ["", "d", "7 days", "-7d", "1.5h", "7M", True, [], 0, "0", 0.0, -0.5, float("nan"), float("inf")]
)
def test_what_is_no_duration_is_refused(text: Any) -> None:
    assert refusal(auto_restore_monitor_interval=text).path == ("auto_restore_monitor_interval",)


def test_the_local_cache_has_the_documented_defaults() -> None:
    settings = cache()
    assert (settings.max_age, settings.max_size, settings.min_free_space) == (None, None, "10%")
    assert (settings.min_age, settings.read_through) == (10 * MINUTE, True)


@pytest.mark.parametrize(
    ("text", "size"),
    [
        (1000, 1000),
        ("512K", 512 << 10),
        ("8M", 8 << 20),
        ("20G", 20 << 30),
        ("1T", 1 << 40),
        ("20g", 20 << 30),
        ("20 GB", 20 << 30),
        ("0", 0),
    ],
)
def test_a_size_is_written_as_synapse_writes_it(text: Any, size: int) -> None:
    assert cache(max_size=text).max_size == size
    assert cache(min_free_space=text).min_free_space == size


@pytest.mark.parametrize("text", ["10%", " 10 %", "0%", "100%"])
def test_free_space_may_be_a_share_of_the_disk(text: str) -> None:
    assert cache(min_free_space=text).min_free_space == text.replace(" ", "")


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("max_size", "20P"),
        ("max_size", -1),
        ("max_size", "much"),
        ("min_free_space", "101%"),
        ("min_free_space", "%"),
        ("min_free_space", "-1"),
        ("min_free_space", -1),
        ("min_free_space", "1.5%"),
        ("min_free_space", "\u00b2%"),
        ("min_free_space", 1.5),
        ("min_free_space", True),
        ("min_free_space", False),
        ("read_through", "yes"),
    ],
)
def test_a_wrong_value_in_the_local_cache_is_refused_with_its_path(name: str, value: Any) -> None:
    error = refusal(local_cache={name: value})
    assert error.path == ("local_cache", name)
    if name == "min_free_space":
        assert error.reason == "must be a size such as 20G, or a share of the disk such as 10%"


@pytest.mark.parametrize("age", ["6m", "59m", 3599])
def test_an_age_that_may_have_been_meant_in_months_is_refused(age: Any) -> None:
    error = refusal(local_cache={"max_age": age})
    assert error.path == ("local_cache", "max_age")
    assert "minutes" in error.reason


def test_an_age_of_an_hour_is_taken() -> None:
    assert cache(max_age="1h").max_age == HOUR


def test_an_unknown_setting_names_the_nearest_known_one() -> None:
    error = refusal(threadpoolsize=5)
    assert error.path == ("threadpoolsize",)
    assert "threadpool_size" in error.reason
    error = refusal(local_cache={"maxsize": "1G"})
    assert error.path == ("local_cache", "maxsize")
    assert "max_size" in error.reason


@pytest.mark.parametrize("value", [False, "off"])
def test_off_may_be_written_without_quotes(value: Any) -> None:
    assert parse(check_on_startup=value).check_on_startup == "off"


@pytest.mark.parametrize("value", [True, "on", "never"])
def test_other_words_for_the_check_are_refused(value: Any) -> None:
    error = refusal(check_on_startup=value)
    assert error.path == ("check_on_startup",)
    assert all(word in error.reason for word in ("warn", "fail", "off"))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("threadpool_size", 0),
        ("threadpool_size", 1001),
        ("auto_restore", "perhaps"),
        ("auto_restore", 2),
        ("auto_restore", ""),
        ("threadpool_size", True),
        ("auto_restore_batch_size", True),
        ("auto_restore_batch_size", 0),
        ("delete_from_bucket", 1),
        ("auto_restore_startup", "perhaps"),
        ("raw_prefix", "true"),
    ],
)
def test_a_wrong_value_is_refused_with_its_path(name: str, value: Any) -> None:
    assert refusal(**{name: value}).path == (name,)


@pytest.mark.parametrize("name", ["auto_restore", "auto_restore_startup"])
def test_a_switch_that_older_versions_had_is_written_as_they_took_it(name: str) -> None:
    assert all(getattr(parse(**{name: value}), name) is True for value in ("true", "Yes", "ON", "1", 1))
    assert all(getattr(parse(**{name: value}), name) is False for value in ("false", "No", "OFF", "0", 0))


def test_arguments_of_boto3_are_taken_over() -> None:
    key = "0123456789abcdef0123456789abcdef"
    arguments = {"StorageClass": "STANDARD_IA", "SSECustomerKey": key, "SSECustomerAlgorithm": "AES256"}
    settings = parse(extra_args=arguments)
    assert settings.storage_class == "STANDARD_IA"
    assert settings.sse_customer_key is not None
    assert settings.sse_customer_key.get_secret_value() == key
    assert settings.sse_customer_algo == "AES256"


@pytest.mark.parametrize("nothing", [None, {}])
def test_no_arguments_of_boto3_are_none(nothing: Any) -> None:
    assert parse(extra_args=nothing) == parse()


def test_an_argument_of_boto3_that_is_given_twice_alike_is_taken() -> None:
    settings = parse(extra_args={"StorageClass": "STANDARD_IA"}, storage_class="STANDARD_IA")
    assert settings.storage_class == "STANDARD_IA"


def test_an_argument_of_boto3_that_contradicts_a_setting_is_refused() -> None:
    error = refusal(extra_args={"StorageClass": "STANDARD_IA"}, storage_class="STANDARD")
    assert error.path == ("extra_args", "StorageClass")
    assert "storage_class" in error.reason


def test_other_arguments_of_boto3_are_refused() -> None:
    assert refusal(extra_args={"ACL": "public-read"}).path == ("extra_args", "ACL")
    assert refusal(extra_args="StorageClass").path == ("extra_args",)


def test_misplaced_settings_are_kept_apart_with_what_to_do_instead() -> None:
    settings = parse(store_local=True, media_retention={"enabled": True})
    assert len(settings.misplaced) == 2
    assert settings.misplaced[0].startswith("store_local: ")
    assert "media_retention" in settings.misplaced[1]


@pytest.mark.parametrize(
    ("name", "instead", "warning"),
    [
        ("media_retention", "`local_cache: {max_age: …}` replaces its local_media_lifetime", "deletes media for good"),
        ("store_local", "`local_cache` keeps the disk small", "keeps users' media out of the bucket"),
    ],
)
def test_what_once_emptied_the_disk_is_not_replaced_by_what_loses_media(name: str, instead: str, warning: str) -> None:
    (advice,) = parse(**{name: False}).misplaced
    assert instead in advice
    assert warning in advice


def test_the_record_of_misplaced_settings_is_no_setting() -> None:
    assert refusal(misplaced=["x"]).path == ("misplaced",)


def test_no_secret_is_shown() -> None:
    secret = "kept-to-ourselves-and-nobody-else"
    settings = parse(access_key_id=secret, secret_access_key=secret, session_token=secret)
    assert secret not in repr(settings)
    assert secret not in str(settings)
    error = refusal(sse_customer_key=secret)
    assert secret not in str(error)
