//! Tests of leader election between two replicas of the controller.

use std::pin::pin;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use futures::TryStreamExt;
use k8s_openapi::api::coordination::v1::Lease;
use kube::Api;
use kube::api::{WatchEvent, WatchParams};
use nix::sys::signal::Signal;
use raven_api::Gateway;
use raven_tests::{eventually, test_name};

use crate::fixture::{Fixture, SOON, elects, run};

/// Time limit for a takeover, which takes up to 20.1 s; the rest is a margin for busy machines.
///
/// The other replica checks the Lease every 2 s, or 2.4 s with jitter. The Lease expires 15 s after the replica last
/// saw a renewal, which it detects with the same delay, and then it needs a reconcile run of 0.3 s.
const TAKEOVER: Duration = Duration::from_secs(30);

#[tokio::test(flavor = "multi_thread")]
async fn killed_leader_is_replaced_without_flapping() {
    run(test_name!(), async |fixture| {
        fixture.put_two_pools().await?;
        let mut one = fixture.controller("one", &[]).await?;
        let mut two = fixture.controller("two", &[]).await?;
        fixture.two_pools_are_ready().await?;
        let leader = holder(fixture).await?;
        let start = fixture.gateways.get("site").await?;
        elects(&start, &["x-b"])?;

        let (killed, other) = if leader == "one" { (&mut one, &mut two) } else { (&mut two, &mut one) };
        let log = other.output()?;
        ensure!(!leads(&log), "both replicas lead: {log}");
        // A control for the check above: the log of a leader contains the message.
        ensure!(leads(&killed.output()?), "the log of {leader} does not report that it leads: {}", killed.output()?);
        killed.kill()?;
        fixture.lab.cluster().set_ready("x-b", false).await?;
        let end = fixture.within(TAKEOVER, "site", "elects the other node", |g| elects(g, &["x-a"])).await?;
        let now = holder(fixture).await?;
        ensure!(now != leader && !now.is_empty(), "the Lease is held by {now:?}, although {leader} was killed");
        other.ensure_running()?;

        let seen = history(fixture, &start, &end).await?;
        let elections: Vec<_> = seen.iter().map(|g| g.status.clone().unwrap_or_default().active_endpoints).collect();
        let expected = [&start, &end].map(|g| g.status.clone().unwrap_or_default().active_endpoints);
        assert_eq!(elections, expected[1..], "the election changes exactly once");
        Ok(())
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn suspended_leader_does_not_write_after_its_lease_expired() {
    run(test_name!(), async |fixture| {
        fixture.put_two_pools().await?;
        let one = fixture.controller("one", &[]).await?;
        eventually(SOON, "the first replica leads", async || {
            ensure!(holder(fixture).await? == "one");
            Ok(())
        })
        .await?;
        let mut two = fixture.controller("two", &[]).await?;
        fixture.two_pools_are_ready().await?;

        // The leader receives an event that a node is not ready and is stopped before it reacts, so its first action
        // after SIGCONT would be a write. Meanwhile the other replica leads and finds the node ready again. The
        // controller delays its reaction by 0.2 s; if this test was slower than that, it restores the previous state
        // and tries again. (Which task of the process wakes first is a race: without the check of the Lease, this test
        // failed in one of three runs. The unit tests of `lead` and `apply` are deterministic.)
        let cluster = fixture.lab.cluster();
        let mut start = fixture.gateways.get("site").await?;
        let stopped = loop {
            cluster.set_ready("x-b", false).await?;
            one.signal(Signal::SIGSTOP)?;
            let stopped = std::time::Instant::now();
            let reacted = elects(&fixture.gateways.get("site").await?, &["x-b"]).is_err();
            cluster.set_ready("x-b", true).await?;
            if !reacted {
                break stopped;
            }
            one.signal(Signal::SIGCONT)?;
            cluster.set_ready("x-a", false).await?;
            fixture.until("site", "elects x-b again", |g| elects(g, &["x-b"])).await?;
            cluster.set_ready("x-a", true).await?;
            start = fixture.gateways.get("site").await?;
        };
        fixture.within(TAKEOVER, "site", "has its previous election", |g| elects(g, &["x-b"])).await?;
        eventually(TAKEOVER, "the second replica leads", async || {
            ensure!(holder(fixture).await? == "two");
            Ok(())
        })
        .await?;
        fixture.put_gateway("site", crate::fixture::site(&["x-a", "x-b"])).await?;
        fixture.fence().await?;
        let settled = fixture.gateways.get("site").await?;
        while stopped.elapsed() < Duration::from_secs(30) {
            tokio::time::sleep(Duration::from_millis(200)).await;
        }

        one.signal(Signal::SIGCONT)?;
        eventually(SOON, "the first replica reports that it lost the Lease", async || {
            let log = one.output()?;
            ensure!(log.contains("no longer leading"), "{log}");
            Ok(())
        })
        .await?;
        fixture.fence().await?;
        two.ensure_running()?;
        ensure!(holder(fixture).await? == "two", "the Lease changed its holder");
        let end = fixture.gateways.get("site").await?;
        assert_eq!(
            end.metadata.resource_version,
            settled.metadata.resource_version,
            "the Gateway was written: {}",
            one.output()?
        );
        let seen = history(fixture, &start, &end).await?;
        let moved = seen.iter().any(|g| elects(g, &["x-b"]).is_err());
        ensure!(!moved, "the election changed: {seen:?}");
        Ok(())
    })
    .await;
}

/// Reports whether a replica has ever logged that it leads. The field `still_leading` of other messages does not count.
fn leads(log: &str) -> bool {
    // Remove escape sequences of colours, which would separate the words.
    let plain: String = log
        .split('\u{1b}')
        .map(|part| part.strip_prefix('[').and_then(|p| p.split_once('m')).map_or(part, |(_, text)| text))
        .collect();
    plain.lines().any(|line| line.contains("raven_controller::lead: leading identity="))
}

async fn holder(fixture: &Fixture) -> Result<String> {
    let leases: Api<Lease> = Api::namespaced(fixture.lab.cluster().client(), "kube-system");
    eventually(SOON, "the Lease has a holder", async || {
        let spec = leases.get("raven-controller").await?.spec.unwrap_or_default();
        spec.holder_identity.filter(|holder| !holder.is_empty()).context("the Lease has no holder")
    })
    .await
}

// Returns every version of the Gateway after `from`, up to and including `to`, from the API server's watch history.
async fn history(fixture: &Fixture, from: &Gateway, to: &Gateway) -> Result<Vec<Gateway>> {
    let version = |g: &Gateway| g.metadata.resource_version.clone().context("the Gateway has no resourceVersion");
    let (first, last) = (version(from)?, version(to)?);
    let only = WatchParams::default().fields("metadata.name=site").timeout(10);
    let mut events = pin!(fixture.gateways.watch(&only, &first).await?);
    let mut seen = Vec::new();
    while let Some(event) = events.try_next().await? {
        match event {
            WatchEvent::Modified(gateway) => {
                let done = version(&gateway)? == last;
                seen.push(gateway);
                if done {
                    return Ok(seen);
                }
            }
            WatchEvent::Bookmark(_) => {}
            other => anyhow::bail!("{other:?}"),
        }
    }
    anyhow::bail!("the watch ended before version {last}: {seen:?}")
}
