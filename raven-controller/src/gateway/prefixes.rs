//! Assigns prefixes to nodes: those of the node's pods, and those of the Gateway's annotation. A prefix belongs to
//! one pool only.
//!
//! Receives drafts in the order of seniority with their nodes elected; adds each node's prefixes and the refusals. A
//! refused prefix is in no status, so no dataplane routes it.
//!
//! The CNI determines the prefixes of a node's pods:
//! - Calico's IPAM assigns blocks and publishes them as BlockAffinities. If a node has blocks, its podCIDRs are
//!   ignored. A podCIDR that overlaps a block of any node belongs to Calico's pool of addresses and is ignored as well.
//! - flannel uses `Node.spec.podCIDRs` (`pkg/subnet/kube/kube.go`, AcquireLease: it does not start without a podCIDR).
//!   Its annotations `flannel.alpha.coreos.com/…` contain the backend's type, MAC and VNI, and the address at which
//!   flannel's peers reach the node. None of them replaces the podCIDRs or the InternalIP. With flannel's older etcd
//!   store the API contains no subnets: users list them in the Gateway's annotation.
//! - Every other CNI: `Node.spec.podCIDRs`.

use std::collections::BTreeMap;

use ipnet::IpNet;
use prefix_trie::joint::JointPrefixMap;
use raven_api::ANNOTATION_EXTRA_CIDRS;

use super::claims::{Claims, Conflict, Kind, Owner};
use super::facts::{BadPrefix, NodeFacts, NodeName, parse_prefix};
use super::inputs::Inputs;
use super::protected::{self, PREFIX_PROTECTED, ProtectedPrefixes};
use super::refusal::{Notice, Refusal};
use super::status::Draft;

/// Assigns prefixes to every node of every draft.
pub(crate) fn assign<'a>(inputs: &'a Inputs, drafts: &mut [Draft<'a>]) {
    let protected = ProtectedPrefixes::new(inputs, drafts);
    let blocks = Blocks::new(inputs);
    let mut claims = Claims::default();
    drafts.iter_mut().for_each(|draft| pod_prefixes(draft, &blocks, &protected, &mut claims));
    drafts.iter_mut().for_each(|draft| report_addresses_in_pod_prefixes(draft, &claims));
    // Extra prefixes are claimed after the pod prefixes of all pools: an annotation such as 10.0.0.0/8 on an old
    // Gateway must not take the pod prefixes of younger pools off the network.
    drafts.iter_mut().for_each(|draft| extra_prefixes(draft, &protected, &mut claims));
}

// Index of Calico's blocks, built once for the whole cluster.
struct Blocks<'a> {
    by_node: BTreeMap<&'a NodeName, Vec<&'a Result<IpNet, BadPrefix>>>,
    all: JointPrefixMap<IpNet, ()>,
}

impl<'a> Blocks<'a> {
    fn new(inputs: &'a Inputs) -> Self {
        let mut blocks = Self { by_node: BTreeMap::new(), all: JointPrefixMap::new() };
        for block in inputs.blocks.values() {
            blocks.by_node.entry(&block.node).or_default().push(&block.prefix);
            if let Ok(prefix) = block.prefix {
                blocks.all.insert(prefix, ());
            }
        }
        // Sorted by prefix, IPv4 first, as podCIDRs are. The names of blocks have a different order.
        blocks.by_node.values_mut().for_each(|list| list.sort_by_key(|prefix| prefix.as_ref().ok().copied()));
        blocks
    }

    // Returns the prefixes of a node's pods and the name of their source.
    fn of(&self, node: &'a NodeFacts) -> (&'static str, Vec<&'a Result<IpNet, BadPrefix>>) {
        match self.by_node.get(&node.name) {
            Some(blocks) => ("Calico block", blocks.clone()),
            None => (
                "podCIDR",
                node.pod_cidrs
                    .iter()
                    .filter(|cidr| cidr.as_ref().map_or(true, |prefix| !self.overlaps(prefix)))
                    .collect(),
            ),
        }
    }

    fn overlaps(&self, prefix: &IpNet) -> bool {
        self.all.cover(prefix).chain(self.all.children(prefix)).next().is_some()
    }
}

fn pod_prefixes<'a>(draft: &mut Draft<'a>, blocks: &Blocks<'a>, protected: &ProtectedPrefixes, claims: &mut Claims) {
    let Draft { gateway, nodes, refusals, .. } = draft;
    for (node, subnets) in nodes {
        let (source, prefixes) = blocks.of(node);
        for prefix in prefixes {
            let prefix = match prefix {
                Ok(prefix) => *prefix,
                Err(bad) => {
                    let message = format!(
                        "{source} {:?} of node {} is not a prefix ({}): correct Node.spec.podCIDRs",
                        bad.text, node.name, bad.error
                    );
                    refusals.push(Refusal::new("BadPodCIDR", message));
                    continue;
                }
            };
            let what = format!("{source} {prefix} of node {}", node.name);
            let owner = Owner { gateway: gateway.name.clone(), node: node.name.clone(), kind: Kind::Pod };
            match claim(what, prefix, &owner, protected, claims) {
                Ok(true) => subnets.push(prefix),
                Ok(false) => {}
                Err(refusal) => refusals.push(refusal),
            }
        }
    }
}

// A pool cannot send another pool's pod prefix into the tunnel if one of its own nodes has an address in it. Other
// pools are not affected.
fn report_addresses_in_pod_prefixes(draft: &mut Draft<'_>, claims: &Claims) {
    let Draft { gateway, nodes, refusals, .. } = draft;
    for (node, _) in nodes.iter() {
        for address in node.addresses() {
            let Some((held, owner)) = claims.holder(address).filter(|(_, owner)| owner.gateway != gateway.name) else {
                continue;
            };
            let message = format!(
                "InternalIP {address} of node {} lies in {held} of node {} in Gateway {}: this pool cannot reach those pods, because it needs the address outside the tunnel; \
                 change the LAN prefix of the site or the pod prefix",
                node.name, owner.node, owner.gateway
            );
            refusals.push(Refusal::new("NodeAddressInPodPrefix", message));
        }
    }
}

fn extra_prefixes(draft: &mut Draft<'_>, protected: &ProtectedPrefixes, claims: &mut Claims) {
    let (extra, bad) = annotated(draft);
    draft.refusals.extend(bad);
    // The first elected node carries extra prefixes. If no node is elected, the other conditions report it.
    let Some(carrier) = draft.tunnel.elected.first().map(|e| e.node_name.clone()) else {
        return;
    };
    let Draft { gateway, nodes, refusals, .. } = draft;
    let Some((node, subnets)) = nodes.iter_mut().find(|(node, _)| node.name.as_str() == carrier) else {
        return;
    };
    for prefix in extra {
        let what = format!("prefix {prefix} of annotation {ANNOTATION_EXTRA_CIDRS}");
        let owner = Owner { gateway: gateway.name.clone(), node: node.name.clone(), kind: Kind::Extra };
        match claim(what, prefix, &owner, protected, claims) {
            Ok(true) => subnets.push(prefix),
            Ok(false) => {}
            Err(refusal) => refusals.push(refusal),
        }
    }
}

// Claims `prefix`, which messages call `what`. False if the owner's pool has it already.
fn claim(
    what: String,
    prefix: IpNet,
    owner: &Owner,
    protected: &ProtectedPrefixes,
    claims: &mut Claims,
) -> Result<bool, Refusal> {
    if let Some((held, reason)) = protected.conflict(prefix, &owner.gateway, owner.kind) {
        let message = protected::message(&what, prefix, held, reason, &owner.gateway);
        return Err(Refusal::new(PREFIX_PROTECTED, message));
    }
    claims.claim(prefix, owner.clone()).map_err(|conflict| claimed_twice(what, owner, &conflict))
}

fn annotated(draft: &Draft<'_>) -> (Vec<IpNet>, Vec<Refusal>) {
    let annotations = draft.gateway.resource.metadata.annotations.as_ref();
    let text = annotations.and_then(|a| a.get(ANNOTATION_EXTRA_CIDRS)).map(String::as_str).unwrap_or_default();
    let (mut good, mut bad) = (Vec::new(), Vec::new());
    for item in text.split(',').filter(|item| !item.trim().is_empty()) {
        match parse_prefix(item) {
            Ok(prefix) => good.push(prefix),
            Err(e) => bad.push(Refusal::new(
                "BadAnnotation",
                format!("{:?} in annotation {ANNOTATION_EXTRA_CIDRS} is not a prefix ({}): write prefixes such as 192.168.1.0/24, separated by commas", e.text, e.error),
            )),
        }
    }
    (good, bad)
}

fn claimed_twice(what: String, claimant: &Owner, conflict: &Conflict) -> Refusal {
    let Conflict { held, owner } = conflict;
    let message = format!(
        "{what} overlaps {held} of node {} in Gateway {}, which keeps it: change one of the two prefixes; until then this one is ignored",
        owner.node, owner.gateway
    );
    let refusal = Refusal::new("PrefixClaimedTwice", message);
    if owner.gateway == claimant.gateway {
        return refusal;
    }
    let note = format!(
        "{held} of node {} stays with this Gateway; Gateway {} claims it too ({what}) and is refused: if the prefix belongs to that Gateway, remove it here",
        owner.node, claimant.gateway
    );
    refusal.with_notice(Notice { to: owner.gateway.clone(), reason: "PrefixContested", note })
}
