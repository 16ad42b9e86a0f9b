//! Test of gateway nodes that are dialled by name, as behind a load balancer that has only a host name.

use std::time::Duration;

use anyhow::ensure;
use kube::{Api, api::PostParams};
use raven_api::Gateway;
use raven_tests::{Lab, eventually, kubernetes::objects::default_gateway, proof, require_root};

use crate::Running;

/// The agents look names up every 20 s.
const FOLLOWED: Duration = Duration::from_secs(40);

#[tokio::test(flavor = "multi_thread")]
async fn address_of_a_name_that_does_not_answer_is_replaced_by_the_next() {
    require_root!();
    let lab = Lab::builder().up().await.expect("start the lab");
    lab.cluster().apply_gateways(lab.site()).await.expect("apply the Gateways");
    let mut gateway = default_gateway(lab.site(), lab.cloud());
    by_name(&mut gateway);
    lab.cluster().apply_gateway(&gateway).await.expect("change the cloud's Gateway");
    for node in ["x-a", "y-a"] {
        // No host has the first address, and the edges have no route to the second one.
        let hosts = "printf '198.51.100.6 gw.example\n2001:db8:dead::1 gw.example\n198.51.100.10 gw.example\n' > /run/raven/hosts
                     ip -6 route add unreachable 2001:db8:dead::/48
                     mount --bind /run/raven/hosts /etc/hosts";
        lab.node(node).ns.sh(hosts).expect("name the cloud's gateway node");
    }
    let controller = lab.start_controller().await.expect("start the controller");
    let agents = lab.start_agents().await.expect("start the agents");
    let running = Running { agents, _controller: controller, lab };
    running.check(proof::converged(&running.lab).await);
}

/// Lets a Gateway be dialled by name only.
fn by_name(gateway: &mut Gateway) {
    for endpoint in &mut gateway.spec.endpoints {
        endpoint.public_ip = None;
        endpoint.config.insert("hostname".to_owned(), "gw.example".to_owned());
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn gateway_node_is_dialled_by_name_and_followed() {
    require_root!();
    let mut running = Running::start().await.expect("start the lab");
    for node in ["x-a", "y-a"] {
        let hosts = "touch /run/raven/hosts; mount --bind /run/raven/hosts /etc/hosts";
        running.check(running.lab.node(node).ns.sh(hosts));
        // An agent has its own mounts, from its start.
        running.agent(node).restart().expect("restart the agent");
        let ready = proof::ready(running.agent(node)).await;
        running.check(ready);
    }
    let lab = &running.lab;
    let (cloud, edge) = (lab.pool("cloud").clone(), lab.pool("edge-x").clone());
    let name_leads_to = |address: &str| {
        for node in ["x-a", "y-a"] {
            let hosts = format!("echo '{address} gw.example' > /run/raven/hosts");
            running.check(lab.node(node).ns.sh(&hosts));
        }
    };
    let dialled = async |address: &str, within: Duration| {
        let wanted = format!("{address}:4500");
        let what = format!("x-a and y-a dial {wanted}");
        let shown = eventually(within, &what, || async {
            for node in ["x-a", "y-a"] {
                let endpoints = lab.node(node).ns.run("wg", &["show", "raven-wg0", "endpoints"])?;
                ensure!(endpoints.contains(&wanted), "{node}: {endpoints}");
            }
            Ok(())
        });
        running.check(shown.await);
        running.check(proof::reach(lab, &cloud, &edge, 0).await);
    };

    name_leads_to("198.51.100.10");
    let gateways: Api<Gateway> = Api::all(lab.cluster().client());
    let mut gateway = running.check(gateways.get("cloud").await.map_err(Into::into));
    by_name(&mut gateway);
    running.check(gateways.replace("cloud", &PostParams::default(), &gateway).await.map_err(Into::into));
    // The edges know the address by the name alone.
    let public = running.check(gateways.get("cloud").await.map_err(Into::into));
    assert!(public.spec.endpoints.iter().all(|endpoint| endpoint.public_ip.is_none()));
    dialled("198.51.100.10", FOLLOWED).await;

    // The cloud moves to another address.
    running.check(cloud.router.sh("ip addr add 198.51.100.60/24 dev wan"));
    running.check(cloud.router.nft(
        "table ip second { chain pre {
            type nat hook prerouting priority dstnat - 1
            ip daddr 198.51.100.60 udp dport 4500 dnat to 10.0.0.11:4500
        }; }",
    ));
    name_leads_to("198.51.100.60");
    dialled("198.51.100.60", FOLLOWED).await;

    // A changed address in the Gateway is used at once.
    let mut gateway = running.check(gateways.get("cloud").await.map_err(Into::into));
    for endpoint in &mut gateway.spec.endpoints {
        endpoint.public_ip = Some("198.51.100.10".to_owned());
    }
    running.check(gateways.replace("cloud", &PostParams::default(), &gateway).await.map_err(Into::into));
    dialled("198.51.100.10", Duration::from_secs(2)).await;
}
