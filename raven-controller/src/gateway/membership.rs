//! Assigns nodes to Gateways: by the node's label, then by the Gateways' selectors. [`rules`](super::rules) assigns
//! the remaining nodes.
//!
//! A node belongs to at most one Gateway. Gateways that select a node of a different Gateway get a refusal.

use std::collections::BTreeMap;

use kube::core::{Selector, SelectorExt};
use raven_api::{Gateway, LABEL_GATEWAY};

use super::facts::{GatewayFacts, GatewayName, NodeFacts, NodeName};
use super::inputs::Inputs;
use super::refusal::{Notice, Refusal};
use super::text::enumerate;

/// Nodes of all Gateways.
#[derive(Debug, Default)]
pub(crate) struct Membership {
    pools: BTreeMap<GatewayName, Vec<NodeName>>,
    lost: BTreeMap<GatewayName, BTreeMap<Winner, Vec<NodeName>>>,
    /// Gateways to create: required by a rule and absent.
    pub(crate) create: Vec<Gateway>,
    /// Gateways to delete: created by a rule and no longer required.
    pub(crate) delete: Vec<GatewayName>,
    /// Messages about nodes without a pool whose labels or NodePools suggest one.
    pub(crate) strays: Vec<String>,
}

/// Gateway that got a contested node.
#[derive(Debug, PartialEq, Eq, PartialOrd, Ord)]
struct Winner {
    gateway: GatewayName,
    by_label: bool,
}

/// Assigns nodes by labels and selectors. Returns the remaining nodes for the pool rules.
pub(crate) fn resolve(inputs: &Inputs) -> (Membership, Vec<&NodeFacts>) {
    let mut membership = Membership::default();
    let selectors: Vec<(&GatewayName, &Selector)> =
        inputs.by_seniority().into_iter().filter(|g| !inputs.is_ruled(g)).filter_map(selector_of).collect();

    let mut free = Vec::new();
    for node in inputs.nodes.values() {
        let selected: Vec<&GatewayName> =
            selectors.iter().filter(|(_, selector)| selector.matches(&node.labels)).map(|(name, _)| *name).collect();
        if let Some(label) = node.label(LABEL_GATEWAY) {
            membership.by_label(inputs, node, &label.into(), &selected);
        } else if let Some((winner, losers)) = selected.split_first() {
            membership.join(node, winner, losers, false);
        } else {
            free.push(node.as_ref());
        }
    }
    (membership, free)
}

fn selector_of(gateway: &GatewayFacts) -> Option<(&GatewayName, &Selector)> {
    let selector = gateway.selector.as_ref().ok()?.as_ref()?;
    Some((&gateway.name, selector))
}

impl Membership {
    /// Returns the nodes of a Gateway, sorted by name, and refusals for nodes of other Gateways that it selects.
    pub(crate) fn pool_of<'a>(&self, inputs: &'a Inputs, gateway: &GatewayFacts) -> (Vec<&'a NodeFacts>, Vec<Refusal>) {
        let names = self.pools.get(&gateway.name).map(Vec::as_slice).unwrap_or_default();
        let mut nodes: Vec<&NodeFacts> =
            names.iter().filter_map(|name| inputs.nodes.get(name)).map(AsRef::as_ref).collect();
        nodes.sort_by(|a, b| a.name.cmp(&b.name));
        let mut refusals = Vec::new();
        if let Err(error) = &gateway.selector {
            refusals.push(Refusal::new(
                "BadSelector",
                format!("nodeSelector is invalid ({error}): it matches no node until it is corrected"),
            ));
        }
        refusals.extend(
            self.lost.get(&gateway.name).into_iter().flatten().map(|(winner, nodes)| refusal(gateway, winner, nodes)),
        );
        (nodes, refusals)
    }

    /// True if a node is assigned to the Gateway.
    pub(crate) fn has_nodes(&self, gateway: &GatewayName) -> bool {
        self.pools.contains_key(gateway)
    }

    /// Assigns a node to a Gateway.
    pub(crate) fn add(&mut self, gateway: &GatewayName, node: &NodeName) {
        self.pools.entry(gateway.clone()).or_default().push(node.clone());
    }

    fn by_label(&mut self, inputs: &Inputs, node: &NodeFacts, label: &GatewayName, selected: &[&GatewayName]) {
        if inputs.gateways.contains_key(label) {
            let losers: Vec<&GatewayName> = selected.iter().copied().filter(|name| *name != label).collect();
            self.join(node, label, &losers, true);
        } else {
            // Selectors and rules do not apply: the label names the intended Gateway, which may be created later.
            self.strays.push(format!(
                "node {} is labelled {LABEL_GATEWAY}={label}, but there is no Gateway of that name: create the Gateway, or correct the label",
                node.name
            ));
        }
    }

    fn join(&mut self, node: &NodeFacts, winner: &GatewayName, losers: &[&GatewayName], by_label: bool) {
        self.add(winner, &node.name);
        for loser in losers {
            let winner = Winner { gateway: winner.clone(), by_label };
            self.lost.entry((*loser).clone()).or_default().entry(winner).or_default().push(node.name.clone());
        }
    }
}

fn refusal(gateway: &GatewayFacts, winner: &Winner, nodes: &[NodeName]) -> Refusal {
    let criterion = if winner.by_label {
        format!("by its label {LABEL_GATEWAY}")
    } else {
        "which is older, or first by name".to_owned()
    };
    let what = if nodes.len() == 1 { "node" } else { "nodes" };
    let belongs = if nodes.len() == 1 { "belongs" } else { "belong" };
    let message = format!(
        "{what} {} match{} this nodeSelector and {belongs} to Gateway {} ({criterion}): narrow one of the two selectors, or label the node {LABEL_GATEWAY}={} to assign it to this Gateway",
        enumerate(nodes),
        if nodes.len() == 1 { "es" } else { "" },
        winner.gateway,
        gateway.name,
    );
    let note = format!(
        "{what} {} {belongs} to this Gateway ({criterion}); the nodeSelector of Gateway {} matches {} too and is refused: narrow one of the two selectors",
        enumerate(nodes),
        gateway.name,
        if nodes.len() == 1 { "it" } else { "them" },
    );
    Refusal::new("NodeClaimedTwice", message).with_notice(Notice {
        to: winner.gateway.clone(),
        reason: "NodeContested",
        note,
    })
}
