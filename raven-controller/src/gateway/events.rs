//! Events that follow from a new status: gateway nodes elected, replaced or lost, and claims refused.
//!
//! Events are derived from the difference between the present status and the new one, so each is published once,
//! even across restarts.

use std::collections::BTreeSet;

use k8s_openapi::apimachinery::pkg::apis::meta::v1::Condition;
use raven_api::condition::ConditionType;
use raven_api::gateway::{EndpointType, GatewayStatus};

use super::facts::{GatewayName, NodeName};
use super::inputs::Inputs;
use super::refusal::Refusal;
use super::status::{AGENT_NOT_READY, BY_NAME_ONLY, NO_READY_NODE, find_agents};
use super::text::{MAX_ITEMS, enumerate, type_name};

/// An Event about a Gateway that is not published yet.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Change {
    /// True for type Warning: a user should act.
    pub(crate) warning: bool,
    /// Reason in CamelCase; part of the API.
    pub(crate) reason: String,
    /// Message for users.
    pub(crate) note: String,
}

/// Returns Events for other Gateways about refused claims that the present condition does not contain yet.
pub(crate) fn notices<'a>(
    old: Option<&GatewayStatus>,
    refusals: &'a [Refusal],
) -> impl Iterator<Item = (&'a GatewayName, Change)> {
    let reported =
        old.and_then(|s| condition(s, ConditionType::Accepted)).map(|c| c.message.clone()).unwrap_or_default();
    // The condition contains the first refusals only, so it is unknown whether later ones are new.
    let new = refusals.iter().take(MAX_ITEMS).filter(move |refusal| !reported.contains(&refusal.message));
    let notices = new.filter_map(|refusal| refusal.notice.as_ref());
    notices.map(|notice| {
        (&notice.to, Change { warning: false, reason: notice.reason.to_owned(), note: notice.note.clone() })
    })
}

/// Returns the Events for the difference between two statuses of `gateway`.
pub(crate) fn changes(
    inputs: &Inputs,
    gateway: &GatewayName,
    old: Option<&GatewayStatus>,
    new: &GatewayStatus,
) -> Vec<Change> {
    let elections = [EndpointType::Tunnel, EndpointType::Proxy];
    let moved = elections.into_iter().filter_map(|type_| moved(inputs, gateway, type_, old, new));
    moved.chain(kept(old, new)).chain(refused(old, new)).chain(ambiguous(old, new)).collect()
}

fn moved(
    inputs: &Inputs,
    gateway: &GatewayName,
    type_: EndpointType,
    old: Option<&GatewayStatus>,
    new: &GatewayStatus,
) -> Option<Change> {
    let before = old.map(|s| elected(s, type_)).unwrap_or_default();
    let after = elected(new, type_);
    let added: Vec<&str> = after.difference(&before).copied().collect();
    let removed: Vec<String> = before
        .difference(&after)
        .map(|node| format!("{node} ({})", removal_reason(inputs, gateway, type_, node, new)))
        .collect();
    let what = type_name(type_);
    let (warning, reason, note) = match (added.is_empty(), removed.is_empty()) {
        (true, true) => return None,
        (false, true) => (false, "GatewayNodeElected", format!("{what}: elected {}", enumerate(&added))),
        (false, false) => {
            (false, "GatewayNodeReplaced", format!("{what}: {} replaces {}", enumerate(&added), enumerate(&removed)))
        }
        (true, false) if after.is_empty() => (
            true,
            "GatewayNodeLost",
            format!(
                "{what}: lost {} and no candidate can replace it: the pool is cut off until one of its nodes is Ready",
                enumerate(&removed)
            ),
        ),
        (true, false) => (false, "GatewayNodeWithdrawn", format!("{what}: no longer elected: {}", enumerate(&removed))),
    };
    Some(Change { warning, reason: reason.to_owned(), note })
}

fn elected(status: &GatewayStatus, type_: EndpointType) -> BTreeSet<&str> {
    status.active_endpoints.iter().filter(|e| e.type_ == type_).map(|e| e.node_name.as_str()).collect()
}

fn removal_reason(
    inputs: &Inputs,
    gateway: &GatewayName,
    type_: EndpointType,
    node: &str,
    new: &GatewayStatus,
) -> String {
    match inputs.nodes.get(&NodeName::from(node)) {
        None => "the node was deleted".to_owned(),
        Some(_) if new.nodes.iter().all(|n| n.node_name != node) => {
            format!("it left the pool of {gateway}")
        }
        Some(facts) if !facts.ready => "it is not Ready".to_owned(),
        Some(facts) if inputs.without_agent.contains(&facts.name) => {
            format!("its agent is not Ready: {}", find_agents(&[node]))
        }
        Some(facts) if inputs.links.get(&facts.name).and_then(|report| report.of(type_)) == Some(false) => {
            "it is Ready but cut off from all other pools, while other sites are connected: check its uplink and firewall".to_owned()
        }
        Some(_) => "it is no longer a candidate, or fewer replicas are configured".to_owned(),
    }
}

// The pool may be cut off although the elected nodes stay the same: no candidate is ready, or none has an agent.
fn kept(old: Option<&GatewayStatus>, new: &GatewayStatus) -> impl Iterator<Item = Change> {
    let causes = [(ConditionType::Elected, NO_READY_NODE), (ConditionType::Ready, AGENT_NOT_READY)];
    causes.into_iter().filter(|_| !new.active_endpoints.is_empty()).filter_map(move |(type_, reason)| {
        let has = |status: &GatewayStatus| condition(status, type_).is_some_and(|c| c.reason == reason);
        let began = has(new) && !old.is_some_and(has);
        let found = condition(new, type_).filter(|_| began)?;
        Some(Change { warning: true, reason: found.reason.clone(), note: found.message.clone() })
    })
}

fn refused(old: Option<&GatewayStatus>, new: &GatewayStatus) -> Option<Change> {
    let before = old.and_then(|s| condition(s, ConditionType::Accepted));
    let after = condition(new, ConditionType::Accepted)?;
    let was_refused = before.is_some_and(|c| c.status == "False");
    if after.status == "False" {
        let reported = was_refused && before.is_some_and(|c| c.message == after.message);
        return (!reported).then(|| Change {
            warning: true,
            reason: after.reason.clone(),
            note: after.message.clone(),
        });
    }
    was_refused.then(|| Change { warning: false, reason: after.reason.clone(), note: after.message.clone() })
}

// The cloud's gateway nodes refuse and count proxy connections to an ambiguous address.
fn ambiguous(old: Option<&GatewayStatus>, new: &GatewayStatus) -> Option<Change> {
    let note = |status: &GatewayStatus| -> Option<String> {
        let ready = condition(status, ConditionType::Ready)?;
        ready.message.split("; ").find(|note| note.starts_with(BY_NAME_ONLY)).map(str::to_owned)
    };
    let now = note(new)?;
    (old.and_then(note).as_ref() != Some(&now)).then(|| Change {
        warning: true,
        reason: "NodeAddressAmbiguous".to_owned(),
        note: now,
    })
}

fn condition(status: &GatewayStatus, type_: ConditionType) -> Option<&Condition> {
    status.conditions.iter().find(|c| c.type_ == type_.as_str())
}
