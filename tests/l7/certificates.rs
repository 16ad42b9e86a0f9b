//! Who gets a certificate of the proxies' CA: the agent on the node that it is for, and nobody else.

use std::time::Duration;

use anyhow::{Context, ensure};
use k8s_openapi::{
    ByteString,
    api::{certificates::v1::CertificateSigningRequest, events::v1::Event},
};
use kube::{
    Api,
    api::{ListParams, PostParams},
};
use raven_api::{
    gateway::{Endpoint, EndpointType},
    proxy::{SIGNER_CLIENT, SIGNER_SERVER},
};
use raven_tests::{Lab, eventually, kubernetes::objects::default_gateway, privileged, proof};
use rcgen::{CertificateParams, KeyPair};

use crate::{Running, SOON};

#[tokio::test(flavor = "multi_thread")]
async fn an_agent_that_asks_for_another_nodes_certificate_is_denied_with_an_event() {
    if !privileged("an_agent_that_asks_for_another_nodes_certificate_is_denied_with_an_event") {
        return;
    }
    let running = Running::of(Lab::builder()).await.expect("the lab starts");
    let lab = &running.lab;
    // As the agent of x-b, with its own token: what somebody has who stole the box.
    let kubeconfig = running.check(lab.cluster().agent_kubeconfig(lab, lab.node("x-b")).await);
    let text =
        std::fs::read_to_string(&kubeconfig).expect("a kubeconfig").replace("198.51.100.10", &lab.host_link.control_plane.to_string());
    std::fs::write(&kubeconfig, text).expect("written");
    let stolen: Api<CertificateSigningRequest> = Api::all(raven_tests::kubernetes::client(&kubeconfig).await.expect("a client"));
    for (name, signer, usage, reason) in
        [("x-a", SIGNER_CLIENT, "client auth", "NamesNotAllowed"), ("198.51.100.10", SIGNER_SERVER, "server auth", "NotElected")]
    {
        let key = KeyPair::generate().expect("a key");
        let params = CertificateParams::new(vec![name.to_owned()]).expect("a name");
        let pem = params.serialize_request(&key).expect("a request").pem().expect("PEM");
        let request = serde_json::from_value(serde_json::json!({
            "metadata": { "generateName": "stolen-" },
            "spec": { "request": ByteString(pem.into_bytes()), "signerName": signer, "usages": ["digital signature", usage] },
        }));
        let made = stolen.create(&PostParams::default(), &request.expect("a request")).await.expect("anybody may ask");
        let made = made.metadata.name.expect("a name");
        let denied = || async {
            let status = stolen.get(&made).await?.status.context("nobody has decided")?;
            ensure!(status.certificate.is_none(), "it was signed");
            let condition = status.conditions.into_iter().flatten().find(|c| c.type_ == "Denied").context("not denied yet")?;
            ensure!(condition.reason.as_deref() == Some(reason), "{condition:?}");
            Ok(())
        };
        running.check(eventually(SOON, &format!("the request for {name} is denied"), denied).await);
        let events: Api<Event> = Api::all(lab.cluster().client());
        let told = || async {
            let events = events.list(&ListParams::default()).await?;
            let event = events.items.into_iter().find(|e| e.regarding.as_ref().and_then(|r| r.name.as_deref()) == Some(&made));
            let event = event.context("no Event about it")?;
            ensure!(event.reason.as_deref() == Some(reason) && event.note.is_some_and(|n| n.contains("x-b")), "another Event");
            Ok(())
        };
        running.check(eventually(SOON, "an Event says so", told).await);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_node_that_is_deleted_takes_its_certificate_along_also_where_a_new_one_has_its_name() {
    if !privileged("a_node_that_is_deleted_takes_its_certificate_along_also_where_a_new_one_has_its_name") {
        return;
    }
    let mut running = Running::of(Lab::builder()).await.expect("the lab starts");
    // No other node of the site takes over.
    let mut gateway = default_gateway(running.lab.site(), running.lab.pool("edge-x"));
    let only = Endpoint { node_name: "x-a".to_owned(), type_: EndpointType::Proxy, under_nat: true, ..Endpoint::default() };
    gateway.spec.endpoints.push(only);
    running.check(running.lab.cluster().apply_gateway(&gateway).await);
    running.check(running.serve("x-b").await);
    running.check(running.answered("x-b").await);
    let request = || running.ask("cloud-b", "x-b", 20);

    // The box is stolen and its node deleted: its tunnels end, though its certificate is good for months.
    running.check(running.lab.cluster().delete_node("x-a").await);
    let closed = || async {
        let said = request()?;
        ensure!(said.contains("no tunnel to Gateway edge-x"), "it says {said:?}");
        Ok(())
    };
    running.check(eventually(SOON, "the tunnels are closed", closed).await);

    // Another box gets the name. The stolen one is turned away at the door, and gets no other certificate by its old token.
    let refused = || proof::metric(&running.lab.node("cloud-a").ns, "raven_proxy_refused_total{reason=\"NotElected\"}");
    running.check(running.lab.cluster().apply_node(running.lab.site(), running.lab.node("x-a")).await);
    let requests: Api<CertificateSigningRequest> = Api::all(running.lab.cluster().client());
    let denied = || async {
        let requests = requests.list(&ListParams::default()).await?;
        let conditions = requests.items.iter().filter_map(|r| r.status.as_ref()?.conditions.as_ref()).flatten();
        ensure!(conditions.into_iter().any(|c| c.type_ == "Denied" && c.reason.as_deref() == Some("NodeReplaced")), "{requests:?}");
        Ok(())
    };
    running.check(eventually(SOON, "the old token gets no certificate", denied).await);
    let before = running.check(refused().await);
    let again = || async {
        ensure!(refused().await? > before, "it has not dialled yet");
        Ok(())
    };
    // Who was refused dials again after 30 s at the latest, which its jitter may double.
    running.check(eventually(Duration::from_secs(90), "the old certificate is turned away", again).await);
    let said = running.check(request());
    assert!(said.contains("no tunnel to Gateway edge-x"), "{said}");

    // The new box, with a token of its own.
    running.check(running.lab.cluster().delete_agent_pod("x-a").await);
    running.check(running.lab.cluster().agent_kubeconfig(&running.lab, running.lab.node("x-a")).await);
    running.agent("x-a").restart().expect("the agent starts");
    running.check(running.answered("x-b").await);
}
