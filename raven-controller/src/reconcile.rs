//! Reconciles Gateways: waits for changes of the cluster, decides, and writes the difference while this replica leads.
//!
//! Each run decides for the whole cluster. A run without differences writes nothing.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::Duration;

use backon::{BackoffBuilder, ExponentialBackoff, ExponentialBuilder};
use futures::{FutureExt, StreamExt};
use jiff::Timestamp;
use raven_api::gateway::{Gateway, GatewayStatus};
use tokio::sync::{mpsc, oneshot, watch};
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;
use tracing::Instrument;

use crate::apply::{Error, StatusWrite, Writer};
use crate::cluster::{Snapshot, Update};
use crate::gateway::events::Change;
use crate::gateway::facts::{GatewayFacts, GatewayName, UnreadableGateway};
use crate::gateway::inputs::Inputs;
use crate::gateway::status::Decision;
use crate::gateway::{Decisions, decide, events};
use crate::lead::Leadership;

// Coalesces a `kubectl apply` of a directory into one run; too short to be noticed by users.
const COALESCE: Duration = Duration::from_millis(200);
// The API server keeps Events for an hour by default.
const REPUBLISH: Duration = Duration::from_mins(40);
// Concurrent status writes: after an outage there may be hundreds.
const CONCURRENT_WRITES: usize = 8;

// Results of a run's writes.
#[derive(Default)]
struct Tally {
    written: usize,
    failed: usize,
}

/// Writes the decisions of [`decide`] to the API server.
pub(crate) struct Reconciler {
    writer: Writer,
    snapshots: watch::Receiver<Arc<Snapshot>>,
    updates: mpsc::Sender<Update>,
    leadership: Leadership,
    strays: BTreeSet<String>,
    unreadable: BTreeMap<GatewayName, Arc<UnreadableGateway>>,
    // Gateways whose status the API server refuses: the reported generation, and when it was reported.
    refused: BTreeMap<GatewayName, (Option<i64>, Instant)>,
    runs: u64,
}

impl Reconciler {
    /// Creates a reconciler. Results of its writes are sent to `updates`, so that the next run is based on them.
    pub(crate) fn new(
        writer: Writer,
        snapshots: watch::Receiver<Arc<Snapshot>>,
        updates: mpsc::Sender<Update>,
        leadership: Leadership,
    ) -> Self {
        Self {
            writer,
            snapshots,
            updates,
            leadership,
            strays: BTreeSet::new(),
            unreadable: BTreeMap::new(),
            refused: BTreeMap::new(),
            runs: 0,
        }
    }

    /// Reconciles until `stop` is cancelled.
    pub(crate) async fn run(mut self, stop: CancellationToken) {
        let mut due: Option<Instant> = None;
        let mut delays = backoff();
        let mut revision = 0;
        loop {
            let next_run = due.filter(|_| *self.leadership.leads.borrow() && self.snapshots.borrow().complete);
            tokio::select! {
                changed = self.snapshots.changed() => {
                    if changed.is_err() {
                        return;
                    }
                    // Own writes do not advance the revision and need no run; a failed run is repeated
                    // after its backoff.
                    let latest = self.snapshots.borrow_and_update().revision;
                    if latest != revision {
                        revision = latest;
                        due = earlier(due, COALESCE);
                    }
                }
                changed = self.leadership.leads.changed() => {
                    if changed.is_err() {
                        return;
                    }
                    due = earlier(due, Duration::ZERO);
                }
                () = tokio::time::sleep_until(next_run.unwrap_or_else(Instant::now)), if next_run.is_some() => {
                    self.runs += 1;
                    let span = tracing::info_span!("reconcile", run = self.runs);
                    let Tally { written, failed } = self.reconcile_while_leading(&stop).instrument(span).await;
                    if failed == 0 {
                        delays = backoff();
                    }
                    // The response to a write may contain a concurrent change (for example of the spec). The watch then
                    // reports no difference, so another run is needed.
                    due = match (written, failed) {
                        (0, 0) => None,
                        (_, 0) => earlier(None, COALESCE),
                        _ => delays.next().map(|delay| Instant::now() + delay),
                    };
                }
                () = stop.cancelled() => return,
            }
        }
    }

    // A run ends early if this replica loses the Lease or the process stops. A write in progress either takes effect or
    // not; the next leader observes which.
    async fn reconcile_while_leading(&mut self, stop: &CancellationToken) -> Tally {
        let mut leads = self.leadership.leads.clone();
        tokio::select! {
            tally = self.reconcile() => tally,
            _ = leads.wait_for(|leads| !leads) => Tally::default(),
            () = stop.cancelled() => Tally::default(),
        }
    }

    async fn reconcile(&mut self) -> Tally {
        let inputs = self.snapshots.borrow().inputs();
        let decisions = decide(&inputs);
        self.log_strays(&decisions);
        // Statuses first: existing Gateways take precedence over creations and deletions.
        let mut tally = Tally::default();
        self.write_statuses(&inputs, &decisions, &mut tally).await;
        self.write_gateways(&inputs, &decisions, &mut tally).await;
        self.write_unreadable(&inputs.unreadable, &mut tally).await;
        tally
    }

    // Each defect is reported once. The present conditions of the Gateway are unknown, so a new leader reports it again.
    async fn write_unreadable(&mut self, found: &BTreeMap<GatewayName, Arc<UnreadableGateway>>, tally: &mut Tally) {
        self.unreadable.retain(|name, reported| found.get(name) == Some(reported));
        for (name, gateway) in found {
            if self.unreadable.contains_key(name) {
                continue;
            }
            match self.writer.unreadable(name, gateway, Timestamp::now()).await {
                Ok(()) => drop(self.unreadable.insert(name.clone(), gateway.clone())),
                Err(e) => self.account(vec![Err(e)], tally).await,
            }
        }
    }

    async fn write_statuses(&mut self, inputs: &Inputs, decisions: &Decisions, tally: &mut Tally) {
        let now = Timestamp::now();
        let mut writes = Vec::new();
        // The known version of an unreadable Gateway is older than the object, so that a write would be rejected.
        for (name, decision) in decisions.gateways.iter().filter(|(name, _)| !inputs.unreadable.contains_key(*name)) {
            let Some(facts) = inputs.gateways.get(name) else {
                continue;
            };
            let status = decision.status(&facts.resource, now);
            if facts.resource.status.as_ref() != Some(&status) {
                writes.push(write_status(&self.writer, inputs, facts, decision, status).boxed());
            }
        }
        let results: Vec<_> = futures::stream::iter(writes).buffer_unordered(CONCURRENT_WRITES).collect().await;
        let (refused, results): (Vec<_>, Vec<_>) =
            results.into_iter().partition(|result| result.as_ref().is_err_and(|e| e.invalid().is_some()));
        self.report_refused(inputs, refused.into_iter().filter_map(Result::err), tally).await;
        self.account(results, tally).await;
    }

    // A Gateway without a status says nothing, so an Event names the cause. The write is repeated after a change, and not
    // with the backoff of writes that may succeed later.
    async fn report_refused(&mut self, inputs: &Inputs, errors: impl Iterator<Item = Error>, tally: &mut Tally) {
        for error in errors {
            let Some((name, message)) = error.invalid() else { continue };
            let name = GatewayName::from(name);
            let Some(facts) = inputs.gateways.get(&name) else { continue };
            let generation = facts.resource.metadata.generation;
            let reported = self.refused.get(&name);
            if reported.is_some_and(|(of, at)| *of == generation && at.elapsed() < REPUBLISH) {
                continue;
            }
            tracing::warn!(gateway = %name, error = message, "the API server refuses the status of a Gateway because of its spec");
            let note = format!(
                "the API server refuses the status of this Gateway because of its spec: correct it (kubectl edit gateway {name}); {message}"
            );
            let change = Change { warning: true, reason: "StatusRefused".to_owned(), note };
            if self.writer.event(&facts.resource, &change, None).await {
                self.refused.insert(name, (generation, Instant::now()));
            } else {
                tally.failed += 1;
            }
        }
    }

    async fn write_gateways(&self, inputs: &Inputs, decisions: &Decisions, tally: &mut Tally) {
        let mut results = Vec::new();
        for gateway in &decisions.create {
            let result = self.writer.create(gateway).await;
            if let Ok(created) = &result {
                tracing::info!(gateway = created.metadata.name, "created a Gateway required by a pool rule");
            }
            results.push(result.map(Some));
        }
        for gateway in decisions.delete.iter().filter_map(|name| inputs.gateways.get(name)) {
            let result = self.writer.delete(&gateway.resource).await;
            if result.is_ok() {
                tracing::info!(gateway = %gateway.name, "deleted a Gateway that no pool rule requires");
            }
            results.push(result.map(|()| None));
        }
        for name in &decisions.orphans {
            match self.writer.delete_orphan(name).await {
                Ok(false) => {}
                Ok(true) => {
                    tracing::info!(node = %name, "deleted the GatewayNode of a node that no longer exists");
                    results.push(Ok(None));
                }
                Err(e) => results.push(Err(e)),
            }
        }
        for name in &decisions.silent {
            match self.writer.silent(name, Timestamp::now()).await {
                Ok(false) => {}
                Ok(true) => {
                    tracing::warn!(node = %name, "no agent works on this node; its GatewayNode is no longer Ready");
                    results.push(Ok(None));
                }
                Err(e) => results.push(Err(e)),
            }
        }
        self.account(results, tally).await;
    }

    // Counts results and adds the written Gateways to the cluster's state, before the watch reports them.
    async fn account(&self, results: Vec<Result<Option<Gateway>, Error>>, tally: &mut Tally) {
        let mut gateways = Vec::new();
        for result in results {
            match result {
                Ok(written) => {
                    tally.written += 1;
                    gateways.extend(written);
                }
                Err(e) => {
                    tally.failed += 1;
                    tracing::warn!(error = %e, "write failed; retrying with backoff");
                }
            }
        }
        let (absorbed, in_snapshot) = oneshot::channel();
        if !gateways.is_empty() && self.updates.send(Update::Written(gateways, absorbed)).await.is_ok() {
            let _ = in_snapshot.await;
        }
    }

    // No Gateway has a condition for these nodes. Each message is logged once until it changes.
    fn log_strays(&mut self, decisions: &Decisions) {
        let strays: BTreeSet<String> = decisions.strays.iter().cloned().collect();
        for stray in strays.difference(&self.strays) {
            tracing::warn!(problem = %stray, "a node belongs to no pool");
        }
        self.strays = strays;
    }
}

async fn write_status(
    writer: &Writer,
    inputs: &Inputs,
    facts: &GatewayFacts,
    decision: &Decision,
    status: GatewayStatus,
) -> Result<Option<Gateway>, Error> {
    let gateway = facts.resource.as_ref();
    let StatusWrite::Written(written) = writer.status(gateway, &status).await? else {
        return Ok(None);
    };
    for change in events::changes(inputs, &facts.name, gateway.status.as_ref(), &status) {
        if change.warning {
            tracing::warn!(gateway = %facts.name, reason = %change.reason, note = %change.note, "Gateway changed");
        } else {
            tracing::info!(gateway = %facts.name, reason = %change.reason, note = %change.note, "Gateway changed");
        }
        writer.event(gateway, &change, None).await;
    }
    for (other, change) in events::notices(gateway.status.as_ref(), &decision.refusals) {
        if let Some(other) = inputs.gateways.get(other) {
            writer.event(&other.resource, &change, Some(gateway)).await;
        }
    }
    Ok(Some(*written))
}

fn earlier(due: Option<Instant>, delay: Duration) -> Option<Instant> {
    let then = Instant::now() + delay;
    Some(due.map_or(then, |due| due.min(then)))
}

fn backoff() -> ExponentialBackoff {
    ExponentialBuilder::default()
        .with_jitter()
        .with_min_delay(Duration::from_secs(1))
        .with_max_delay(Duration::from_secs(60))
        .without_max_times()
        .build()
}
