//! Gateways as OpenYurt's users have stored them: v1alpha1 had no `exposeType`.

use std::time::Duration;

use anyhow::{Context, Result, ensure};
use kube::Api;
use raven_api::{GatewayNode, gateway::ExposeType};
use raven_tests::{Lab, eventually, kubernetes::objects::default_gateway, proof, require_root};

use crate::Running;

#[tokio::test(flavor = "multi_thread")]
async fn gateways_without_expose_type_relay_and_are_dialled() {
    require_root!();
    let lab = Lab::builder().up().await.expect("start the lab");
    for pool in &lab.site().pools {
        let mut gateway = default_gateway(lab.site(), pool);
        gateway.spec.expose_type = ExposeType::Edge;
        lab.cluster().apply_gateway(&gateway).await.expect("apply the Gateway");
    }
    let controller = lab.start_controller().await.expect("start the controller");
    let agents = lab.start_agents().await.expect("start the agents");
    let running = Running { agents, _controller: controller, lab };
    running.check(proof::converged(&running.lab).await.map(drop));
    let nodes: Api<GatewayNode> = Api::all(running.lab.cluster().client());
    for node in ["x-a", "y-a"] {
        let connected = || async {
            let status = nodes.get(node).await?.status.context("no status")?;
            let of_proxy = status.conditions.iter().find(|condition| condition.type_ == "ProxyConnected");
            ensure!(of_proxy.is_some_and(|condition| condition.status == "True"), "{of_proxy:?}");
            Ok(())
        };
        let connected: Result<()> = eventually(Duration::from_secs(60), "the L7 half is connected", connected).await;
        running.check(connected);
    }
}
