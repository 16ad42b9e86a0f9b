//! Which Gateways are exposed: gateway nodes of other pools dial them, and they relay.
//!
//! Those with an `exposeType` are. Gateways of OpenYurt's v1alpha1 have none: there, every Gateway that is not behind NAT is
//! dialled and may relay. In a cluster where no person has set an `exposeType`, the Gateways whose endpoints are cloud nodes
//! and not `underNAT` are exposed. Those of edge nodes are not: `underNAT` may have been left out. In a cluster
//! without a labelled edge node every node looks like a cloud node; there, a `publicIP` is required.

use std::collections::BTreeSet;
use std::sync::Arc;

use super::facts::{GatewayFacts, GatewayName, NodeName};
use super::inputs::Inputs;

/// Returns the names of the exposed Gateways.
pub(crate) fn exposed(inputs: &Inputs) -> BTreeSet<GatewayName> {
    let declared = |gateway: &&GatewayFacts| !gateway.resource.spec.expose_type.is_edge();
    let all = || inputs.gateways.values().map(Arc::as_ref);
    let by_hand = || all().filter(|gateway| !inputs.is_ruled(gateway));
    let mut exposed: Vec<&GatewayFacts> = all().filter(declared).collect();
    if !by_hand().any(|gateway| declared(&gateway)) {
        let labelled = inputs.nodes.values().any(|node| node.is_edge());
        exposed.extend(by_hand().filter(|gateway| is_in_cloud(inputs, gateway) && (labelled || has_address(gateway))));
    }
    exposed.into_iter().map(|gateway| gateway.name.clone()).collect()
}

fn is_in_cloud(inputs: &Inputs, gateway: &GatewayFacts) -> bool {
    let endpoints = &gateway.resource.spec.endpoints;
    let mut nodes = endpoints.iter().filter_map(|e| inputs.nodes.get(&NodeName::from(e.node_name.as_str()))).peekable();
    nodes.peek().is_some() && nodes.all(|node| !node.is_edge()) && endpoints.iter().all(|e| !e.under_nat)
}

fn has_address(gateway: &GatewayFacts) -> bool {
    gateway.resource.spec.endpoints.iter().any(|e| e.public_address().is_some())
}
