//! Reports problems of this node as Events about its Gateway, so that `kubectl describe gateway` shows those of member
//! nodes, too, most of which have no GatewayNode.
//!
//! The number of Events is bounded: only the most important problems, only those that last, and only so many per hour.

use std::{
    collections::{BTreeMap, VecDeque},
    sync::Arc,
    time::{Duration, Instant},
};

use kube::{
    Client, Resource,
    runtime::events::{Event, EventType, Recorder, Reporter},
};
use raven_api::{Gateway, MANAGER_AGENT, event};
use tokio::sync::watch;

use super::Latest;
use crate::topology::Inputs;

/// Reason of the Events.
const REASON: &str = "NodeProblem";
/// Interval of the check.
const PERIOD: Duration = Duration::from_secs(5);
/// Age of a problem at which it is published: a start or a change of the topology passes.
const SETTLED: Duration = Duration::from_secs(15);
/// Interval at which a lasting problem is published again. The API server deletes Events after an hour.
const REPEAT: Duration = Duration::from_secs(2400);
/// Number of problems considered, the most important first.
const CONSIDERED: usize = 3;
/// Maximum number of Events within [`REPEAT`].
const LIMIT: usize = 12;

/// Publishes until the process ends. A failure is logged; the Event is published again after [`REPEAT`].
pub async fn run(
    client: Client,
    node: String,
    latest: watch::Receiver<Latest>,
    seen: watch::Receiver<Option<Arc<Inputs>>>,
) {
    let reporter = Reporter { controller: MANAGER_AGENT.to_owned(), instance: Some(node.clone()) };
    let mut problems = Problems::default();
    let mut period = tokio::time::interval(PERIOD);
    loop {
        period.tick().await;
        let Some((report, _)) = latest.borrow().clone() else { continue };
        let Some(gateway) = report.plan.pool.as_deref().and_then(|pool| gateway(seen.borrow().as_deref(), pool)) else {
            continue;
        };
        for problem in problems.due(report.complaints(), Instant::now()) {
            let published = Event {
                type_: EventType::Warning,
                reason: REASON.to_owned(),
                note: Some(event::note(format!("node {node}: {problem}"))),
                action: "Reconcile".to_owned(),
                secondary: None,
            };
            // A new recorder per Event: one recorder aggregates Events of the same reason and keeps the first note.
            let recorder = Recorder::new(client.clone(), reporter.clone());
            if let Err(e) = recorder.publish(&published, &gateway.object_ref(&())).await {
                tracing::warn!(problem, error = %e, "cannot publish an Event (check that deploy/rbac.yaml is applied)");
            }
        }
    }
}

fn gateway(inputs: Option<&Inputs>, name: &str) -> Option<Gateway> {
    inputs?.gateways.iter().find(|gateway| gateway.metadata.name.as_deref() == Some(name)).cloned()
}

/// Problems of the last check, and the times of the last Events.
#[derive(Debug, Default)]
struct Problems {
    known: BTreeMap<String, Known>,
    published: VecDeque<Instant>,
}

#[derive(Clone, Copy, Debug)]
struct Known {
    since: Instant,
    published: Option<Instant>,
}

impl Problems {
    /// Replaces the problems by the present ones, the most important first. Returns those to publish now.
    fn due(&mut self, present: impl Iterator<Item = String>, now: Instant) -> Vec<String> {
        let mut before = std::mem::take(&mut self.known);
        let mut due = Vec::new();
        while self.published.front().is_some_and(|time| now.duration_since(*time) >= REPEAT) {
            self.published.pop_front();
        }
        for problem in present.take(CONSIDERED) {
            let mut known = before.remove(&problem).unwrap_or(Known { since: now, published: None });
            let settled = now.duration_since(known.since) >= SETTLED;
            let old = known.published.is_none_or(|time| now.duration_since(time) >= REPEAT);
            if settled && old && self.published.len() < LIMIT {
                known.published = Some(now);
                self.published.push_back(now);
                due.push(problem.clone());
            }
            self.known.insert(problem, known);
        }
        due
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn present(names: &[&str]) -> impl Iterator<Item = String> {
        names.iter().map(|name| (*name).to_owned()).collect::<Vec<_>>().into_iter()
    }

    #[test]
    fn lasting_problem_is_published_once_and_repeated_before_its_event_expires() {
        let (start, mut problems) = (Instant::now(), Problems::default());
        let at = |seconds| start + Duration::from_secs(seconds);
        assert_eq!(problems.due(present(&["a", "b"]), at(0)), Vec::<String>::new());
        assert_eq!(problems.due(present(&["a"]), at(15)), ["a"]);
        assert_eq!(problems.due(present(&["a", "b"]), at(20)), Vec::<String>::new(), "b began again");
        assert_eq!(problems.due(present(&["a", "b"]), at(35)), ["b"]);
        assert_eq!(problems.due(present(&["a", "b"]), at(2414)), Vec::<String>::new());
        assert_eq!(problems.due(present(&["a", "b"]), at(2415)), ["a"]);
    }

    #[test]
    fn number_of_events_is_bounded() {
        let (start, mut problems) = (Instant::now(), Problems::default());
        let mut published = 0;
        // A message that contains a number is another problem each time.
        for second in (0..2400).step_by(20) {
            let names: Vec<String> = (0..9).map(|n| format!("{n} at {}", second / 40)).collect();
            let now = start + Duration::from_secs(second);
            published += problems.due(names.into_iter(), now).len();
        }
        assert_eq!(published, LIMIT);
    }
}
