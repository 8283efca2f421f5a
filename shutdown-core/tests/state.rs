//! The laws of a state kept over restarts, on real files.
#![cfg(all(unix, feature = "state"))]
#![expect(clippy::unwrap_used, reason = "a test's helpers, like the test, fail by panicking")]

use std::fs;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use shutdown_core::state::{Document, Fate, Found, StateError, StateSource, StateStore};

fn store(dir: &Path) -> StateStore {
    StateStore::in_dir(dir).node_id("node")
}

/// A counter that is kept under `name`.
fn counter(name: &'static str) -> (Arc<AtomicU64>, StateSource) {
    let count = Arc::new(AtomicU64::new(0));
    let (captured, restored) = (Arc::clone(&count), Arc::clone(&count));
    let source = StateSource::new(
        name,
        move || Ok(captured.load(Ordering::Relaxed)),
        move |count: u64, _| {
            restored.store(count, Ordering::Relaxed);
            Ok(())
        },
    );
    (count, source)
}

fn on_disk(dir: &Path) -> Document {
    Document::parse(&fs::read(dir.join("state.json")).unwrap()).unwrap()
}

fn names(dir: &Path) -> Vec<String> {
    let mut names: Vec<_> =
        fs::read_dir(dir).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
    names.sort();
    names
}

#[test]
fn what_a_source_knew_at_the_last_save_is_there_after_the_restart() {
    let dir = tempfile::tempdir().unwrap();
    let (count, source) = counter("served");
    let first = store(dir.path()).source(source);
    assert_eq!(first.open().unwrap().found, Found::Nothing);
    count.store(42, Ordering::Relaxed);
    first.save().unwrap();
    drop(first);

    let (count, source) = counter("served");
    let second = store(dir.path()).source(source);
    let loaded = second.open().unwrap();
    assert_eq!((loaded.found, loaded.clean, loaded.shutdown_at), (Found::Newest, false, None));
    assert!(matches!(loaded.sources[..], [("served", Fate::Restored { .. })]));
    assert_eq!(count.load(Ordering::Relaxed), 42);
}

#[test]
fn the_incarnation_rises_strictly_even_when_the_clock_stands_or_goes_back() {
    let dir = tempfile::tempdir().unwrap();
    let mut last = 0;
    for _ in 0..5 {
        let store = store(dir.path());
        store.open().unwrap();
        assert!(store.incarnation().unwrap() > last);
        last = store.incarnation().unwrap();
    }
    // Written by a process whose clock was a year ahead.
    let mut future = on_disk(dir.path());
    future.incarnation += 31_536_000_000;
    future.saved_at += 31_536_000_000;
    fs::write(dir.path().join("state.json"), future.to_bytes()).unwrap();
    let store = store(dir.path());
    let loaded = store.open().unwrap();
    assert!(loaded.from_the_future && loaded.age.is_zero());
    assert_eq!(store.incarnation().unwrap(), future.incarnation + 1);
}

#[test]
fn sections_and_fields_that_nobody_here_knows_are_kept_byte_for_byte() {
    let dir = tempfile::tempdir().unwrap();
    let sections = r#"{"theirs": {"a" : [1, 2.50, "\u00e4"]}}"#;
    let crc = crc32fast::hash(sections.as_bytes());
    let file = format!(
        r#"{{"schema":1,"node_id":"n","incarnation":5,"saved_at":7,"shutdown_at":null,"clean":true,"later":{{"x" : 1}},"crc32":{crc},"sections":{sections}}}"#
    );
    fs::write(dir.path().join("state.json"), file).unwrap();
    let (_, source) = counter("ours");
    let store = store(dir.path()).source(source);
    store.open().unwrap();
    store.save().unwrap();
    let text = fs::read_to_string(dir.path().join("state.json")).unwrap();
    assert!(text.contains(r#""theirs": {"a" : [1, 2.50, "\u00e4"]}"#), "{text}");
    assert!(text.contains(r#""later": {"x" : 1}"#), "{text}");
    assert_eq!(on_disk(dir.path()).sections.saved_at("theirs"), Some(7), "it is as old as it was");
}

#[test]
fn a_damaged_state_is_set_aside_with_its_reason_and_the_previous_one_is_used() {
    let dir = tempfile::tempdir().unwrap();
    {
        let store = store(dir.path());
        for n in 1..=3_u64 {
            store.update(|state| state.set("n", &n)).unwrap().unwrap();
            store.save().unwrap();
        }
    }
    let path = dir.path().join("state.json");
    let mut bytes = fs::read(&path).unwrap();
    let middle = bytes.len() / 2;
    bytes.truncate(middle);
    fs::write(&path, &bytes).unwrap();
    let store = store(dir.path());
    let loaded = store.open().unwrap();
    assert_eq!(loaded.found, Found::Earlier);
    assert_eq!(loaded.sections.get::<u64>("n").unwrap(), Some(2));
    let [aside] = &loaded.set_aside[..] else { panic!("{:?}", loaded.set_aside) };
    assert!(aside.to_string().contains("is no JSON object"), "{aside}");
    let now_at = aside.now_at.as_ref().unwrap().as_ref().unwrap();
    assert_eq!(fs::read(now_at).unwrap(), bytes, "what was set aside can be looked at");
}

#[test]
fn only_the_newest_damaged_states_are_kept() {
    let dir = tempfile::tempdir().unwrap();
    for _ in 0..6 {
        fs::write(dir.path().join("state.json"), "{").unwrap();
        let _ = fs::remove_file(dir.path().join("state.json.1"));
        assert_eq!(store(dir.path()).open().unwrap().found, Found::Nothing);
    }
    let damaged = names(dir.path()).iter().filter(|name| name.contains("damaged")).count();
    assert_eq!(damaged, 3, "{:?}", names(dir.path()));
    // The one just set aside stays, whatever the times of the others claim.
    for name in names(dir.path()).into_iter().filter(|name| name.contains("damaged")) {
        fs::rename(dir.path().join(&name), dir.path().join(name.replace("damaged-1", "damaged-9"))).unwrap();
    }
    fs::write(dir.path().join("state.json"), "{").unwrap();
    let _ = fs::remove_file(dir.path().join("state.json.1"));
    let store = store(dir.path());
    let aside = &store.open().unwrap().set_aside[0];
    assert!(fs::exists(aside.now_at.as_ref().unwrap().as_ref().unwrap()).unwrap(), "{aside}");
}

#[test]
fn directories_where_generations_should_be_are_moved_away_and_saving_goes_on() {
    let dir = tempfile::tempdir().unwrap();
    for name in ["state.json", "state.json.1"] {
        store(dir.path()).save().unwrap();
        let path = dir.path().join(name);
        fs::remove_file(&path).unwrap();
        fs::create_dir_all(path.join("full")).unwrap();
        let store = store(dir.path());
        let loaded = store.open().unwrap();
        assert!(loaded.set_aside[0].reason.contains("no regular file"), "{:?}", loaded.set_aside);
        store.save().unwrap();
        store.save().unwrap();
        assert!(dir.path().join("state.json.1").is_file());
    }
}

#[test]
fn an_update_is_saved_or_refused_and_never_lost() {
    let dir = tempfile::tempdir().unwrap();
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build().unwrap();
    let (shutdown, driver) =
        shutdown_core::ShutdownCoordinator::builder().state(store(dir.path())).build().unwrap();
    shutdown.load_state().unwrap();
    let (begun, updating) = std::sync::mpsc::channel();
    let updates = std::thread::spawn(move || {
        let mut accepted = 0_u64;
        while shutdown.update_state(|state| state.set("n", &(accepted + 1)).unwrap()).is_ok() {
            accepted += 1;
            let _ = begun.send(());
        }
        accepted
    });
    updating.recv().unwrap();
    shutdown.initiate_shutdown(shutdown_core::Reason::requested("a test"));
    runtime.block_on(driver.run());
    let accepted = updates.join().unwrap();
    assert!(accepted > 0);
    assert_eq!(on_disk(dir.path()).sections.get::<u64>("n").unwrap(), Some(accepted));
}

#[test]
fn the_incarnation_is_higher_than_that_of_every_generation_there_is() {
    let dir = tempfile::tempdir().unwrap();
    store(dir.path()).save().unwrap();
    let mut previous = on_disk(dir.path());
    previous.incarnation += 31_536_000_000;
    fs::write(dir.path().join("state.json.1"), previous.to_bytes()).unwrap();
    let store = store(dir.path());
    store.open().unwrap();
    assert!(store.incarnation().unwrap() > previous.incarnation);
}

#[test]
fn a_directory_that_somebody_else_put_in_its_place_is_not_touched() {
    let parent = tempfile::tempdir().unwrap();
    let dir = parent.path().join("data");
    let store = store(&dir);
    store.save().unwrap();
    fs::rename(&dir, parent.path().join("moved")).unwrap();
    fs::create_dir(&dir).unwrap();
    fs::write(dir.join("state.json"), "another's").unwrap();
    let error = shutdown_core::sentence(&store.save().unwrap_err());
    assert!(error.contains("another directory"), "{error}");
    assert_eq!(fs::read_to_string(dir.join("state.json")).unwrap(), "another's");
}

#[test]
fn a_lock_file_that_is_removed_is_made_again_and_saving_goes_on() {
    let dir = tempfile::tempdir().unwrap();
    let first = store(dir.path());
    first.save().unwrap();
    fs::remove_file(dir.path().join("state.lock")).unwrap();
    first.save().unwrap();
    assert!(matches!(store(dir.path()).open(), Err(StateError::Held { .. })));
}

#[test]
fn a_lock_file_that_is_another_files_second_name_is_refused_and_nothing_written() {
    let dir = tempfile::tempdir().unwrap();
    let victim = dir.path().join("victim");
    fs::write(&victim, "precious").unwrap();
    fs::create_dir(dir.path().join("data")).unwrap();
    fs::hard_link(&victim, dir.path().join("data/state.lock")).unwrap();
    let error = shutdown_core::sentence(&store(&dir.path().join("data")).open().unwrap_err());
    assert!(error.contains("state.lock"), "{error}");
    assert_eq!(fs::read_to_string(victim).unwrap(), "precious");
}

#[test]
fn the_legacy_state_does_not_come_back_once_there_was_one_of_ours() {
    let dir = tempfile::tempdir().unwrap();
    let legacy = r#"{"peers":["10.0.0.1:1"],"shutdown_at":1,"build_id":"x","circuit_breakers":[]}"#;
    fs::write(dir.path().join("sweetmcp_state.json"), legacy).unwrap();
    fs::write(dir.path().join("state.json"), "{").unwrap();
    assert_eq!(store(dir.path()).open().unwrap().found, Found::Nothing);
    fs::remove_file(dir.path().join("state.json")).unwrap();
    assert_eq!(store(dir.path()).open().unwrap().found, Found::Nothing);
}

#[test]
fn the_legacy_state_is_read_whatever_its_build_and_stays_as_it_is() {
    let dir = tempfile::tempdir().unwrap();
    let legacy = r#"{"peers":["10.0.0.1:8443"],"shutdown_at":1700000000,"build_id":"0badcafe-dirty-x86_64",
        "circuit_breakers":[{"peer":"10.0.0.1:8443","state":"Open","error_count":9,"total_count":10}]}"#;
    let path = dir.path().join("sweetmcp_state.json");
    fs::write(&path, legacy).unwrap();
    let store = store(dir.path());
    let loaded = store.open().unwrap();
    assert_eq!((loaded.found, loaded.shutdown_at), (Found::Newest, Some(1_700_000_000_000)));
    let peers: serde_json::Value = loaded.sections.get("peers").unwrap().unwrap();
    assert_eq!(peers[0]["addr"], "10.0.0.1:8443");
    assert!(loaded.sections.json("breakers").unwrap().contains("\"Open\""));
    assert_eq!(fs::read_to_string(&path).unwrap(), legacy);
}

#[test]
fn a_section_older_than_its_source_allows_is_not_restored() {
    let dir = tempfile::tempdir().unwrap();
    let (count, source) = counter("served");
    count.store(1, Ordering::Relaxed);
    store(dir.path()).source(source).save().unwrap();
    let mut old = on_disk(dir.path());
    old.saved_at -= 3_600_000;
    old.sections.set("served", &1_u64).unwrap();
    fs::write(dir.path().join("state.json"), old.to_bytes()).unwrap();
    let fates: Vec<_> = [Duration::from_secs(3500), Duration::from_secs(3700)]
        .into_iter()
        .map(|limit| {
            let copy = tempfile::tempdir().unwrap();
            fs::copy(dir.path().join("state.json"), copy.path().join("state.json")).unwrap();
            let (_, source) = counter("served");
            let store = store(copy.path()).source(source.max_age(limit));
            store.open().unwrap().sources[0].1.clone()
        })
        .collect();
    assert!(matches!(fates[..], [Fate::TooOld { .. }, Fate::Restored { .. }]), "{fates:?}");
}

#[test]
fn a_source_that_fails_or_panics_harms_only_its_own_section_which_stays_as_it_was() {
    let dir = tempfile::tempdir().unwrap();
    let (count, source) = counter("good");
    let broken = Arc::new(AtomicU64::new(0));
    let how = Arc::clone(&broken);
    let bad = StateSource::new(
        "bad",
        move || match how.load(Ordering::Relaxed) {
            0 => Ok(7_u64),
            1 => Err("no".into()),
            _ => panic!("never"),
        },
        |_: u64, _| Err("not today".into()),
    );
    let first = store(dir.path()).source(source).source(bad);
    first.save().unwrap();
    for how in [1, 2] {
        broken.store(how, Ordering::Relaxed);
        count.store(how, Ordering::Relaxed);
        let error = first.save().unwrap_err();
        assert!(matches!(&error, StateError::Sections(failed) if failed[0].0 == "bad"), "{error}");
        let document = on_disk(dir.path());
        assert_eq!(document.sections.get::<u64>("good").unwrap(), Some(how));
        assert_eq!(document.sections.get::<u64>("bad").unwrap(), Some(7));
    }
    drop(first);
    let bad = StateSource::new("bad", || Ok(0_u64), |_: u64, _| panic!("what is this"));
    let second = store(dir.path()).source(bad);
    let loaded = second.open().unwrap();
    let [("bad", Fate::Failed { reason })] = &loaded.sources[..] else { panic!() };
    assert!(reason.contains("what is this"));
    second.save().unwrap();
    assert_eq!(on_disk(dir.path()).sections.get::<u64>("bad").unwrap(), Some(0));
    // Who goes back to the release before finds what it knew.
    let copy = loaded.copy.as_ref().unwrap().as_ref().unwrap().as_ref().unwrap();
    let copy = Document::parse(&fs::read(copy).unwrap()).unwrap();
    assert_eq!(copy.sections.get::<u64>("bad").unwrap(), Some(7));
}

#[test]
fn sixty_four_threads_save_and_update_without_a_failure_or_a_lost_update() {
    const THREADS: u64 = 64;
    const EACH: u64 = 20;
    let dir = tempfile::tempdir().unwrap();
    {
        let store = store(dir.path());
        store.update(|state| state.set("sum", &0_u64)).unwrap().unwrap();
        std::thread::scope(|scope| {
            for thread in 0..THREADS {
                let store = &store;
                scope.spawn(move || {
                    for n in 0..EACH {
                        store
                            .update(|state| {
                                let sum: u64 = state.get("sum").unwrap().unwrap();
                                state.set("sum", &(sum + 1)).unwrap();
                                state.set(&format!("thread {thread}"), &n).unwrap();
                            })
                            .unwrap();
                        store.save().unwrap();
                    }
                });
            }
        });
        let status = store.status();
        assert_eq!((status.failures, status.last_error), (0, None));
        assert!(status.saves >= THREADS * EACH);
    }
    assert_eq!(names(dir.path()), ["state.json", "state.json.1", "state.lock"]);
    let again = store(dir.path());
    let sections = &again.open().unwrap().sections;
    assert_eq!(sections.get::<u64>("sum").unwrap(), Some(THREADS * EACH));
    for thread in 0..THREADS {
        assert_eq!(sections.get::<u64>(&format!("thread {thread}")).unwrap(), Some(EACH - 1));
    }
}

#[test]
fn a_second_store_on_the_directory_is_told_who_holds_it() {
    let dir = tempfile::tempdir().unwrap();
    let first = store(dir.path());
    first.save().unwrap();
    let second = store(dir.path());
    let error = second.open().unwrap_err().to_string();
    assert!(error.contains(&format!("process {}", std::process::id())), "{error}");
    drop(first);
    second.open().unwrap();
}

#[test]
fn a_directory_that_was_removed_is_made_again_and_nothing_is_lost() {
    let parent = tempfile::tempdir().unwrap();
    let dir = parent.path().join("data");
    let store = store(&dir);
    store.update(|state| state.set("kept", &1)).unwrap().unwrap();
    store.save().unwrap();
    fs::remove_dir_all(&dir).unwrap();
    store.save().unwrap();
    assert_eq!(on_disk(&dir).sections.get::<u64>("kept").unwrap(), Some(1));
    assert!(matches!(StateStore::in_dir(&dir).open(), Err(StateError::Held { .. })));
}

#[test]
fn a_state_beyond_its_cap_is_neither_read_nor_written() {
    let dir = tempfile::tempdir().unwrap();
    {
        let store = store(dir.path()).max_bytes(4096);
        store.save().unwrap();
        let before = fs::read(dir.path().join("state.json")).unwrap();
        store.update(|state| state.set("much", &"x".repeat(5000))).unwrap().unwrap();
        assert!(matches!(store.save(), Err(StateError::TooLarge { max_bytes: 4096, .. })));
        assert_eq!(fs::read(dir.path().join("state.json")).unwrap(), before);
    }
    // Sparse: a gibibyte that is not read.
    let _ = fs::remove_file(dir.path().join("state.json.1"));
    fs::File::create(dir.path().join("state.json")).unwrap().set_len(1 << 30).unwrap();
    let store = store(dir.path());
    let loaded = store.open().unwrap();
    assert!(loaded.set_aside[0].reason.contains("1073741824 bytes"), "{:?}", loaded.set_aside);
}

/// Under paused time the disk is real and takes none of it.
#[tokio::test(start_paused = true)]
async fn a_coordinator_saves_at_its_interval_at_the_reason_and_in_stage_persist() {
    use shutdown_core::{Phase, Reason, ShutdownCoordinator};

    let dir = tempfile::tempdir().unwrap();
    let (count, source) = counter("served");
    let (shutdown, driver) = ShutdownCoordinator::builder()
        .state(store(dir.path()).source(source).interval(Duration::from_secs(60)))
        .build()
        .unwrap();
    assert!(shutdown.load_state().unwrap().is_none());
    let driver = tokio::spawn(driver.run());
    let served = || on_disk(dir.path()).sections.get::<u64>("served").unwrap();

    count.store(1, Ordering::Relaxed);
    tokio::time::sleep(Duration::from_secs(59)).await;
    assert_eq!(served(), Some(0));
    tokio::time::sleep(Duration::from_secs(2)).await;
    assert_eq!(served(), Some(1));

    count.store(2, Ordering::Relaxed);
    let request = shutdown.request_start().unwrap();
    shutdown.initiate_shutdown(Reason::requested("a test"));
    shutdown.until(Phase::Draining).await;
    tokio::time::sleep(Duration::from_millis(25)).await;
    assert_eq!((served(), on_disk(dir.path()).clean), (Some(2), false));
    assert!(on_disk(dir.path()).shutdown_at.is_some());

    count.store(3, Ordering::Relaxed);
    drop(request);
    assert_eq!(shutdown.finished().await.exit_code(), 0);
    assert_eq!((served(), on_disk(dir.path()).clean), (Some(3), true));
    assert!(matches!(shutdown.save_state(), Err(StateError::Closed)));
    driver.await.unwrap();
}

#[test]
fn a_save_before_the_store_was_opened_opens_it_first_and_loses_nothing() {
    let dir = tempfile::tempdir().unwrap();
    {
        let store = store(dir.path());
        store.update(|state| state.set("kept", &1)).unwrap().unwrap();
        store.save().unwrap();
    }
    store(dir.path()).save().unwrap();
    assert_eq!(on_disk(dir.path()).sections.get::<u64>("kept").unwrap(), Some(1));
}

#[test]
fn without_a_store_the_coordinator_says_that_no_state_is_kept() {
    let (shutdown, _driver) = shutdown_core::ShutdownCoordinator::builder().build().unwrap();
    assert!(matches!(shutdown.save_state(), Err(StateError::NotConfigured)));
    assert!(matches!(shutdown.load_state(), Err(StateError::NotConfigured)));
    assert!(matches!(shutdown.update_state(|_| ()), Err(StateError::NotConfigured)));
}
