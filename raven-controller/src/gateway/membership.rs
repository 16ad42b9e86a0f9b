//! Which node belongs to which Gateway: a node's label first, then the Gateways' selectors, then the three pool rules.
//!
//! Gives every node at most one Gateway, and names the Gateways that asked for a node and did not get it.

use std::collections::BTreeMap;

use kube::core::{Selector, SelectorExt};
use raven_api::{Gateway, LABEL_GATEWAY};

use super::inputs::{GatewayFacts, Inputs, NodeFacts};
use super::status::{Notice, Refusal, enumerate};
use super::{GatewayName, NodeName, rules};

/// Who belongs where.
#[derive(Debug, Default)]
pub struct Membership {
    pools: BTreeMap<GatewayName, Vec<NodeName>>,
    lost: BTreeMap<GatewayName, BTreeMap<Winner, Vec<NodeName>>>,
    /// Gateways that a rule wants and nobody wrote.
    pub create: Vec<Gateway>,
    /// Gateways that a rule made and none wants.
    pub delete: Vec<GatewayName>,
    /// Nodes that ended up in no pool though somebody seems to have meant otherwise.
    pub strays: Vec<String>,
}

/// Who got a node instead, and by what.
#[derive(Debug, PartialEq, Eq, PartialOrd, Ord)]
struct Winner {
    gateway: GatewayName,
    by_label: bool,
}

/// Gives every node its pool.
pub fn resolve(inputs: &Inputs) -> Membership {
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
    if inputs.rules {
        rules::apply(inputs, &free, &mut membership);
    }
    membership
}

fn selector_of(gateway: &GatewayFacts) -> Option<(&GatewayName, &Selector)> {
    let selector = gateway.selector.as_ref().ok()?.as_ref()?;
    Some((&gateway.name, selector))
}

// === impl Membership ===

impl Membership {
    /// The nodes of a Gateway, sorted by name, and what it asked for in vain.
    pub fn pool_of<'a>(&self, inputs: &'a Inputs, gateway: &GatewayFacts) -> (Vec<&'a NodeFacts>, Vec<Refusal>) {
        let names = self.pools.get(&gateway.name).map(Vec::as_slice).unwrap_or_default();
        let mut nodes: Vec<&NodeFacts> = names.iter().filter_map(|name| inputs.nodes.get(name)).map(AsRef::as_ref).collect();
        nodes.sort_by(|a, b| a.name.cmp(&b.name));
        let mut refusals = Vec::new();
        if let Err(why) = &gateway.selector {
            refusals.push(Refusal::new(
                "BadSelector",
                format!("nodeSelector is not understood ({why}): it matches no node until it is corrected"),
            ));
        }
        refusals.extend(self.lost.get(&gateway.name).into_iter().flatten().map(|(winner, nodes)| refusal(gateway, winner, nodes)));
        (nodes, refusals)
    }

    /// True if the Gateway has nodes already.
    pub fn has_nodes(&self, gateway: &GatewayName) -> bool {
        self.pools.contains_key(gateway)
    }

    /// Puts a node into a pool.
    pub fn add(&mut self, gateway: &GatewayName, node: &NodeName) {
        self.pools.entry(gateway.clone()).or_default().push(node.clone());
    }

    fn by_label(&mut self, inputs: &Inputs, node: &NodeFacts, label: &GatewayName, selected: &[&GatewayName]) {
        if inputs.gateways.contains_key(label) {
            let losers: Vec<&GatewayName> = selected.iter().copied().filter(|name| *name != label).collect();
            self.join(node, label, &losers, true);
        } else {
            // Not handed to a selector or rule: the label says where the node is meant to be, and the Gateway may be written next.
            self.strays.push(format!(
                "node {} is labelled {LABEL_GATEWAY}={label}, and there is no Gateway of that name: write the Gateway, or correct the label",
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
    let why = if winner.by_label { format!("by its label {LABEL_GATEWAY}") } else { "which is older, or first by name".to_owned() };
    let what = if nodes.len() == 1 { "node" } else { "nodes" };
    let belongs = if nodes.len() == 1 { "belongs" } else { "belong" };
    let message = format!(
        "{what} {} match{} this nodeSelector and {belongs} to Gateway {} ({why}): narrow one of the two selectors, or label the node {LABEL_GATEWAY}={} to have it here",
        enumerate(nodes),
        if nodes.len() == 1 { "es" } else { "" },
        winner.gateway,
        gateway.name,
    );
    let note = format!(
        "{what} {} {belongs} to this Gateway ({why}); the nodeSelector of Gateway {} asks for {} too and does not get {}: narrow one of the two",
        enumerate(nodes),
        gateway.name,
        if nodes.len() == 1 { "it" } else { "them" },
        if nodes.len() == 1 { "it" } else { "them" },
    );
    Refusal::new("NodeClaimedTwice", message).told(Notice { to: winner.gateway.clone(), reason: "NodeContested", note })
}
