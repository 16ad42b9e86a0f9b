//! The loop: updates come in, are coalesced, and the leader brings the cluster's Gateways in line.
//!
//! Owns the [`World`]. Every turn decides for the whole cluster; a turn that changes nothing writes nothing.

use std::collections::BTreeSet;
use std::time::Duration;

use backon::{BackoffBuilder, ExponentialBackoff, ExponentialBuilder};
use futures::{FutureExt, StreamExt};
use jiff::Timestamp;
use raven_api::gateway::{Gateway, GatewayStatus};
use tokio::sync::{mpsc, watch};
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use crate::apply::{Error, Writer, Written};
use crate::gateway::{Decision, Decisions, GatewayFacts, Inputs, decide, events};
use crate::lead::Mandate;
use crate::watch::Update;
use crate::world::{Settings, World};

// Long enough that a kubectl apply of a directory is one turn, short enough that nobody waits for it.
const COALESCE: Duration = Duration::from_millis(200);
// Status writes at a time: after an outage there may be hundreds.
const PARALLEL: usize = 8;

// What came of a turn's writes.
#[derive(Default)]
struct Tally {
    written: usize,
    failed: usize,
}

/// Brings the cluster's Gateways in line with what [`decide`] says.
pub struct Reconciler {
    world: World,
    writer: Writer,
    updates: mpsc::Receiver<Update>,
    mandate: Mandate,
    ready: watch::Sender<bool>,
    strays: BTreeSet<String>,
}

// === impl Reconciler ===

impl Reconciler {
    /// A reconciler with nothing known yet. `mandate` comes from the elector, `ready` goes to the health probes.
    pub fn new(settings: Settings, writer: Writer, updates: mpsc::Receiver<Update>, mandate: Mandate, ready: watch::Sender<bool>) -> Self {
        Self { world: World::new(settings), writer, updates, mandate, ready, strays: BTreeSet::new() }
    }

    /// Runs until `stop`.
    pub async fn run(mut self, stop: CancellationToken) {
        let mut due: Option<Instant> = None;
        let mut delays = backoff();
        loop {
            let may = due.filter(|_| *self.mandate.leads.borrow() && self.world.complete());
            tokio::select! {
                update = self.updates.recv() => {
                    let Some(update) = update else { return };
                    if self.world.absorb(update) {
                        due = earlier(due, COALESCE);
                    }
                    self.ready.send_if_modified(|ready| std::mem::replace(ready, self.world.complete()) != self.world.complete());
                }
                changed = self.mandate.leads.changed() => {
                    if changed.is_err() {
                        return;
                    }
                    due = earlier(due, Duration::ZERO);
                }
                () = tokio::time::sleep_until(may.unwrap_or_else(Instant::now)), if may.is_some() => {
                    let Tally { written, failed } = self.guarded_turn(&stop).await;
                    if failed == 0 {
                        delays = backoff();
                    }
                    // After a write the world is what the server answered, which may hold news (a spec that changed meanwhile), and the
                    // watch, which says the same later, then seems to bring none: so look once more.
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

    // A turn ends early when somebody else leads or the process stops: a write that is half done is either done or not, and the next
    // leader finds out which.
    async fn guarded_turn(&mut self, stop: &CancellationToken) -> Tally {
        let mut leads = self.mandate.leads.clone();
        tokio::select! {
            tally = self.turn() => tally,
            _ = leads.wait_for(|leads| !leads) => Tally::default(),
            () = stop.cancelled() => Tally::default(),
        }
    }

    async fn turn(&mut self) -> Tally {
        let inputs = self.world.inputs();
        let decisions = decide(&inputs);
        self.log_strays(&decisions);
        // Statuses before creations and deletions: what exists is worth more than what is to come.
        let mut tally = Tally::default();
        self.write_statuses(&inputs, &decisions, &mut tally).await;
        self.write_gateways(&inputs, &decisions, &mut tally).await;
        tally
    }

    async fn write_statuses(&mut self, inputs: &Inputs, decisions: &Decisions, tally: &mut Tally) {
        let now = Timestamp::now();
        let mut writes = Vec::new();
        for (name, decision) in &decisions.gateways {
            let Some(facts) = inputs.gateways.get(name) else {
                continue;
            };
            let status = decision.status(&facts.resource, now);
            if facts.resource.status.as_ref() != Some(&status) {
                writes.push(write_status(&self.writer, inputs, facts, decision, status).boxed());
            }
        }
        let results: Vec<_> = futures::stream::iter(writes).buffer_unordered(PARALLEL).collect().await;
        for result in results {
            self.account(result, tally);
        }
    }

    async fn write_gateways(&mut self, inputs: &Inputs, decisions: &Decisions, tally: &mut Tally) {
        for gateway in &decisions.create {
            let result = self.writer.create(gateway).await;
            if let Ok(created) = &result {
                tracing::info!(gateway = created.metadata.name, "made a Gateway by a pool rule");
            }
            self.account(result.map(Some), tally);
        }
        for gateway in decisions.delete.iter().filter_map(|name| inputs.gateways.get(name)) {
            let result = self.writer.delete(&gateway.resource).await;
            if result.is_ok() {
                tracing::info!(gateway = %gateway.name, "deleted a Gateway that no pool rule wants any more");
            }
            self.account(result.map(|()| None), tally);
        }
    }

    fn account(&mut self, result: Result<Option<Gateway>, Error>, tally: &mut Tally) {
        match result {
            Ok(written) => {
                tally.written += 1;
                if let Some(gateway) = written {
                    self.world.absorb_gateway(gateway);
                }
            }
            Err(e) => {
                tally.failed += 1;
                tracing::warn!(error = %e, "will be tried again");
            }
        }
    }

    // There is no Gateway whose condition could say it. Said once, and again when it changes.
    fn log_strays(&mut self, decisions: &Decisions) {
        let strays: BTreeSet<String> = decisions.strays.iter().cloned().collect();
        for stray in strays.difference(&self.strays) {
            tracing::warn!("{stray}");
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
    let Written::Now(written) = writer.status(gateway, &status).await? else {
        return Ok(None);
    };
    for change in events::changes(inputs, &facts.name, gateway.status.as_ref(), &status) {
        if change.warning {
            tracing::warn!(gateway = %facts.name, reason = %change.reason, "{}", change.note);
        } else {
            tracing::info!(gateway = %facts.name, reason = %change.reason, "{}", change.note);
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
