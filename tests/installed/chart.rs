//! The chart renders the objects of `kubectl apply -k deploy`, and its values change what they name.

use std::collections::BTreeMap;
use std::process::Command;

use raven_tests::kubernetes::binaries::{Binaries, HELM};
use serde_json::{Value, json};

use crate::folder;

/// Objects by kind and name.
type Objects = BTreeMap<String, Value>;

fn objects(command: &mut Command) -> Objects {
    let output = command.output().expect("start the program");
    let (text, errors) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    assert!(output.status.success(), "{command:?}: {errors}");
    let documents: Vec<Value> = serde_saphyr::from_multiple(&text).unwrap_or_else(|e| panic!("{e}:\n{text}"));
    let named = documents.into_iter().filter(|object| !object.is_null()).map(|mut object| {
        whole_numbers(&mut object);
        let name = |value: &Value| value.as_str().unwrap_or_default().to_owned();
        let namespace = name(&object["metadata"]["namespace"]);
        (format!("{} {namespace}/{}", name(&object["kind"]), name(&object["metadata"]["name"])), object)
    });
    named.collect()
}

/// kustomize writes 1 where the file has 1.0.
fn whole_numbers(value: &mut Value) {
    match value {
        Value::Array(list) => list.iter_mut().for_each(whole_numbers),
        Value::Object(fields) => fields.values_mut().for_each(whole_numbers),
        Value::Number(number) => {
            if let Some(whole) = number.as_f64().filter(|n| number.is_f64() && n.fract() == 0.0) {
                *value = json!(whole as i64);
            }
        }
        _ => {}
    }
}

fn chart(values: &[&str]) -> Objects {
    objects(&mut template(values))
}

fn template(values: &[&str]) -> Command {
    let helm = HELM.find_or_build_with(&|_| ()).expect("find helm").program("helm");
    let mut command = Command::new(helm);
    command.args(["template", "raven", &folder("deploy/chart"), "--namespace=kube-system", "--include-crds"]);
    values.iter().for_each(|value| _ = command.args(["--set-json", value]));
    command
}

fn agent<'a>(objects: &'a Objects, name: &str) -> &'a Value {
    &objects[&format!("DaemonSet kube-system/{name}")]["spec"]["template"]["spec"]
}

#[test]
fn chart_without_values_renders_the_objects_of_deploy() {
    let kubectl = Binaries::find_or_build().expect("find kubectl").kubectl;
    let expected = objects(Command::new(kubectl).args(["kustomize", &folder("deploy")]));
    let rendered = chart(&[]);
    assert_eq!(rendered.keys().collect::<Vec<_>>(), expected.keys().collect::<Vec<_>>());
    for (name, object) in &expected {
        assert_eq!(&rendered[name], object, "{name}");
    }
}

#[test]
fn components_are_the_same_in_the_chart() {
    let kubectl = Binaries::find_or_build().expect("find kubectl").kubectl;
    for (component, value, argument) in [
        ("boot", "agent.bootUnit=true", "--boot-unit-dir=/host/systemd"),
        ("metrics-secure", "agent.metricsSecure=true", "--metrics-secure"),
    ] {
        let overlay = folder(&format!("target/{component}-overlay"));
        std::fs::create_dir_all(&overlay).expect("create the folder");
        let kustomization = format!("resources: [../../deploy]\ncomponents: [../../deploy/{component}]\n");
        std::fs::write(format!("{overlay}/kustomization.yaml"), kustomization).expect("write the overlay");
        let expected = objects(Command::new(&kubectl).args(["kustomize", &overlay]));
        let rendered = chart(&[value]);
        assert_eq!(rendered, expected, "{component}");
        assert_eq!(agent(&rendered, "raven-agent-ds")["containers"][0]["args"][1], argument);
    }
}

#[test]
fn values_set_images_switches_and_flags() {
    let objects = chart(&[
        r#"image={"agent":"example.com/agent","tag":"9.9","pullPolicy":"Always","pullSecrets":["registry"]}"#,
        "l7=false",
        r#"agentConfig={"forward-node-ip":"true"}"#,
        r#"controller={"replicas":1,"args":["--agent-timeout=5m"],"serviceCIDRs":["10.96.0.0/12"]}"#,
        "wireguard.enabled=false",
        "agent.masqueradeBit=15",
        "agent.tunnelMTU=1340",
        "agent.metricsPort=19265",
        "agent.healthPort=19275",
    ]);
    let spec = agent(&objects, "raven-agent-ds");
    assert_eq!(spec["containers"][0]["image"], "example.com/agent:9.9");
    assert_eq!(spec["containers"][0]["imagePullPolicy"], "Always");
    assert_eq!(spec["imagePullSecrets"], json!([{"name": "registry"}]));
    let flags = ["embedded", "15", "1340", ":19265", ":19275"];
    let names = ["--wireguard-engine", "--masquerade-bit", "--tunnel-mtu", "--metric-bind-addr", "--health-probe-addr"];
    let args: Vec<String> = names.iter().zip(flags).map(|(name, value)| format!("{name}={value}")).collect();
    assert_eq!(spec["containers"][0]["args"], json!(args));
    assert_eq!(spec["containers"][0]["ports"][3], json!({"name": "metrics", "containerPort": 19265}));
    assert_eq!(spec["containers"][0]["ports"][4], json!({"name": "health", "containerPort": 19275}));
    assert!(!objects.contains_key("DaemonSet kube-system/raven-wireguard"));
    assert_eq!(objects["ConfigMap kube-system/raven-cfg"]["data"], json!({"enable-l7-proxy": "false"}));
    assert_eq!(objects["ConfigMap kube-system/raven-agent-config"]["data"], json!({"forward-node-ip": "true"}));
    let controller = &objects["Deployment kube-system/raven-controller"]["spec"];
    assert_eq!(controller["replicas"], 1);
    assert_eq!(
        controller["template"]["spec"]["containers"][0]["args"],
        json!(["--log-format=json", "--service-cidr=10.96.0.0/12", "--agent-timeout=5m"])
    );
}

#[test]
fn metrics_port_and_metric_bind_address_are_exclusive() {
    let both = template(&["agent.metricsPort=19265", r#"agentConfig={"metric-bind-addr":"127.0.0.1:10265"}"#]).output();
    let output = both.expect("start helm");
    let error = String::from_utf8_lossy(&output.stderr);
    assert!(!output.status.success() && error.contains("either agent.metricsPort"), "{error}");
}

#[test]
fn node_is_in_the_daemon_set_of_its_group_or_in_the_default_one() {
    let groups = r#"agent.groups=[{"name":"metered","label":{"key":"uplink","value":"lte"},"args":["--tier=tc"]}]"#;
    let objects = chart(&[groups, r#"agent.args=["--tc-attach=clsact"]"#]);
    let (default, metered) = (agent(&objects, "raven-agent-ds"), agent(&objects, "raven-agent-ds-metered"));
    assert_eq!(default["containers"][0]["args"], json!(["--wireguard-engine=external", "--tc-attach=clsact"]));
    assert_eq!(metered["containers"][0]["args"], json!(["--wireguard-engine=external", "--tier=tc"]));
    assert_eq!(metered["nodeSelector"], json!({"kubernetes.io/os": "linux", "uplink": "lte"}));
    assert_eq!(metered["affinity"], Value::Null);
    let terms =
        &default["affinity"]["nodeAffinity"]["requiredDuringSchedulingIgnoredDuringExecution"]["nodeSelectorTerms"];
    assert_eq!(terms, &json!([{"matchExpressions": [{"key": "uplink", "operator": "NotIn", "values": ["lte"]}]}]));
    let selector = &objects["DaemonSet kube-system/raven-agent-ds-metered"]["spec"]["selector"]["matchLabels"];
    assert_eq!(selector["raven.openyurt.io/agent-group"], "metered");
}
