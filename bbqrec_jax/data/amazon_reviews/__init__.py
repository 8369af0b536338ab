"""Amazon's product reviews of 2014, 2018 and 2023: from the published files to a data set, as a builder of TFDS too."""
