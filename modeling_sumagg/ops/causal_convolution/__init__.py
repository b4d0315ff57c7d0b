from .causal_convolution import causal_convolution as causal_convolution  # the name in 0.2
