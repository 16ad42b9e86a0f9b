//! What of a new status deserves a Kubernetes Event: gateway nodes elected, replaced, lost; claims refused.
//!
//! Compares the status that is there with the one that is about to be written; so nothing is said twice, not even after a restart.

use std::collections::BTreeSet;

use k8s_openapi::apimachinery::pkg::apis::meta::v1::Condition;
use raven_api::condition::ConditionType;
use raven_api::gateway::{EndpointType, GatewayStatus};

use super::inputs::Inputs;
use super::status::{BY_NAME_ONLY, NO_READY_NODE, Refusal, SHOWN, enumerate, type_name};
use super::{GatewayName, NodeName};

/// An Event about a Gateway, before it is published.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Change {
    /// Somebody should look at it.
    pub warning: bool,
    /// CamelCase, stable.
    pub reason: String,
    /// For a person.
    pub note: String,
}

/// What other Gateways should know of the claims that were refused, as far as it is new: what the present condition does not say yet.
pub fn notices<'a>(old: Option<&GatewayStatus>, refusals: &'a [Refusal]) -> impl Iterator<Item = (&'a GatewayName, Change)> {
    let said = old.and_then(|s| condition(s, ConditionType::Accepted)).map(|c| c.message.clone()).unwrap_or_default();
    // Of more than the condition shows, nobody could tell what is new.
    let new = refusals.iter().take(SHOWN).filter(move |refusal| !said.contains(&refusal.message));
    let notices = new.filter_map(|refusal| refusal.notice.as_ref());
    notices.map(|notice| (&notice.to, Change { warning: false, reason: notice.reason.to_owned(), note: notice.note.clone() }))
}

/// What changed between two statuses of `gateway`.
pub fn changes(inputs: &Inputs, gateway: &GatewayName, old: Option<&GatewayStatus>, new: &GatewayStatus) -> Vec<Change> {
    let elections = [EndpointType::Tunnel, EndpointType::Proxy];
    let moved = elections.into_iter().filter_map(|type_| moved(inputs, gateway, type_, old, new));
    moved.chain(kept(old, new)).chain(refused(old, new)).chain(ambiguous(old, new)).collect()
}

fn moved(inputs: &Inputs, gateway: &GatewayName, type_: EndpointType, old: Option<&GatewayStatus>, new: &GatewayStatus) -> Option<Change> {
    let before = old.map(|s| elected(s, type_)).unwrap_or_default();
    let after = elected(new, type_);
    let came: Vec<&str> = after.difference(&before).copied().collect();
    let gone: Vec<String> =
        before.difference(&after).map(|node| format!("{node} ({})", why_gone(inputs, gateway, type_, node, new))).collect();
    let what = type_name(type_);
    let (warning, reason, note) = match (came.is_empty(), gone.is_empty()) {
        (true, true) => return None,
        (false, true) => (false, "GatewayNodeElected", format!("{what}: elected {}", enumerate(&came))),
        (false, false) => (false, "GatewayNodeReplaced", format!("{what}: {} replaces {}", enumerate(&came), enumerate(&gone))),
        (true, false) if after.is_empty() => (
            true,
            "GatewayNodeLost",
            format!(
                "{what}: {} is gone and nobody is left to replace it: the pool is cut off until one of its nodes is Ready",
                enumerate(&gone)
            ),
        ),
        (true, false) => (false, "GatewayNodeWithdrawn", format!("{what}: without {}", enumerate(&gone))),
    };
    Some(Change { warning, reason: reason.to_owned(), note })
}

fn elected(status: &GatewayStatus, type_: EndpointType) -> BTreeSet<&str> {
    status.active_endpoints.iter().filter(|e| e.type_ == type_).map(|e| e.node_name.as_str()).collect()
}

fn why_gone(inputs: &Inputs, gateway: &GatewayName, type_: EndpointType, node: &str, new: &GatewayStatus) -> String {
    match inputs.nodes.get(&NodeName::from(node)) {
        None => "the node does not exist any more".to_owned(),
        Some(_) if new.nodes.iter().all(|n| n.node_name != node) => {
            format!("it left the pool of {gateway}")
        }
        Some(facts) if !facts.ready => "it is not Ready".to_owned(),
        Some(facts) if inputs.links.get(&facts.name).and_then(|says| says.of(type_)) == Some(false) => {
            "it is Ready, and cut off from all other pools, while other sites are not: look at its uplink and firewall".to_owned()
        }
        Some(_) => "it is no candidate any more, or fewer are wanted".to_owned(),
    }
}

// Nobody came and nobody went, and yet the pool may be cut off: the one case where the list of the elected does not tell.
fn kept(old: Option<&GatewayStatus>, new: &GatewayStatus) -> Option<Change> {
    let dark = |status: &GatewayStatus| condition(status, ConditionType::Elected).is_some_and(|c| c.reason == NO_READY_NODE);
    let began = dark(new) && !new.active_endpoints.is_empty() && !old.is_some_and(dark);
    let elected = condition(new, ConditionType::Elected).filter(|_| began)?;
    Some(Change { warning: true, reason: elected.reason.clone(), note: elected.message.clone() })
}

fn refused(old: Option<&GatewayStatus>, new: &GatewayStatus) -> Option<Change> {
    let before = old.and_then(|s| condition(s, ConditionType::Accepted));
    let after = condition(new, ConditionType::Accepted)?;
    let was_refused = before.is_some_and(|c| c.status == "False");
    if after.status == "False" {
        let said = was_refused && before.is_some_and(|c| c.message == after.message);
        return (!said).then(|| Change { warning: true, reason: after.reason.clone(), note: after.message.clone() });
    }
    was_refused.then(|| Change { warning: false, reason: after.reason.clone(), note: after.message.clone() })
}

// By such an address nobody is reached; connections to it are refused at the cloud's gateway nodes, and counted.
fn ambiguous(old: Option<&GatewayStatus>, new: &GatewayStatus) -> Option<Change> {
    let note = |status: &GatewayStatus| -> Option<String> {
        let ready = condition(status, ConditionType::Ready)?;
        ready.message.split("; ").find(|note| note.starts_with(BY_NAME_ONLY)).map(str::to_owned)
    };
    let now = note(new)?;
    (old.and_then(note).as_ref() != Some(&now)).then(|| Change { warning: true, reason: "NodeAddressAmbiguous".to_owned(), note: now })
}

fn condition(status: &GatewayStatus, type_: ConditionType) -> Option<&Condition> {
    status.conditions.iter().find(|c| c.type_ == type_.as_str())
}
