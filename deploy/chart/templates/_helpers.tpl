{{/* An image, with the default tag: dict "root" $ "repository" REPOSITORY. */}}
{{- define "raven.image" -}}
image: {{ .repository }}:{{ .root.Values.image.tag | default .root.Chart.AppVersion }}
{{- with .root.Values.image.pullPolicy }}
imagePullPolicy: {{ . }}
{{- end }}
{{- end }}

{{/* Secrets to pull the images with. */}}
{{- define "raven.pullSecrets" -}}
{{- with .Values.image.pullSecrets }}
imagePullSecrets:
{{- range . }}
  - name: {{ . }}
{{- end }}
{{- end }}
{{- end }}

{{/* Labels of a program: its name. */}}
{{- define "raven.labels" -}}
app.kubernetes.io/name: {{ . }}
app.kubernetes.io/part-of: raven
{{- end }}
